"""timm ResNets, with their BatchNorms unfolded, convert, calibrate, reconstruct and adapt."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import qat
from ptq_init.minmax import MinMaxRange
from ptq_init.percentile_mse import PercentileMSERange
from ptq_init.ttaq import TTAQ
from qat import Phase, Plan
from qat.cost.count import cost
from qat.models import timm_model
from qat.quantizers import Affine, quantizers
from qat.reconstruct.stages import stages
from tests.qat.common import snapshot

PLAN = Plan.load(Path(__file__).parents[2] / "configs" / "plans" / "resnet_w4a4.yaml")
SMALL = {"zero_init_last": False, "channels": (8, 16, 16, 24), "layers": (1, 1, 1, 1)}
STEMS = {"plain": {}, "deep": {"stem_type": "deep", "stem_width": 4, "avg_down": True}}


def resnet(kind: str = "plain", name: str = "resnet18") -> nn.Module:
    """A random ResNet of four blocks whose BatchNorms have seen images; the same every time."""
    torch.manual_seed(1)
    model = timm_model(
        name,
        num_classes=5,
        data_config={"input_size": (3, 32, 32)},
        model_args={**SMALL, **STEMS[kind]},
    )
    with torch.no_grad():
        for seed in range(20):
            model.train()(images(16, seed))
    return model.eval()


def images(count: int, seed: int = 0) -> Tensor:
    """Smooth random images of 32 pixels."""
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, 32, mode="bilinear")


def calibrated(kind: str = "plain") -> nn.Module:
    """A ResNet on four bits."""
    model = resnet(kind)
    qat.convert_(model, PLAN, Affine)
    MinMaxRange()(model, [images(16)])
    return model


@pytest.mark.parametrize("kind", STEMS)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_stages_compose_to_the_model(kind: str, name: str) -> None:
    model = resnet(kind, name)
    x = images(3)
    with torch.no_grad():
        expected = model(x)
        for stage in stages(model):
            x = stage.forward(x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("kind", STEMS)
def test_conversion_changes_nothing_before_calibration_and_covers_every_product(kind: str) -> None:
    model = resnet(kind)
    with torch.no_grad():
        expected = model(images(3))
        qat.convert_(model, PLAN, Affine)
        assert torch.equal(model(images(3)), expected)
    covered = [q for s in stages(model) for m in s.modules for _, q in quantizers(m)]
    assert sorted(map(id, covered)) == sorted(id(q) for _, q in quantizers(model))
    assert cost(model).coverage_macs == 1


def test_calibration_leaves_the_batch_norms_as_they_are_and_the_logits_close() -> None:
    model = resnet()
    with torch.no_grad():
        expected = model(images(16))
    norms = {name: value for name, value in snapshot(model).items() if "bn" in name}
    qat.convert_(model, PLAN, Affine)
    PercentileMSERange()(model, [images(16)])
    after = snapshot(model)
    assert norms
    assert all(torch.equal(after[name], value) for name, value in norms.items())
    with torch.no_grad():
        gap = (model(images(16)) - expected).norm() / expected.norm()
    assert 0 < gap < 0.4


@pytest.mark.parametrize("pem", ["A-relative", "C"])
def test_reconstruction_keeps_running_statistics_and_lowers_the_error(pem: str) -> None:
    model = resnet()
    batch = images(16)
    with torch.no_grad():
        expected = model(batch)
    qat.convert_(model, PLAN, Affine)
    MinMaxRange()(model, [batch])
    with torch.no_grad():
        start = (model(batch) - expected).norm()
    fresh = resnet()
    statistics = {name: v for name, v in snapshot(fresh).items() if "running" in name}
    qat.convert_(fresh, PLAN, Affine)
    method = TTAQ(
        pem=pem,  # type: ignore[arg-type]
        pem_weight=1e-3,
        pcr="1",
        pcr_weight=0.01,
        start=MinMaxRange(),
        scope="tensor",
        num_steps=20,
        lr=2e-3,
    )
    method(fresh, [batch])
    after = snapshot(fresh)
    assert statistics
    assert all(torch.equal(after[name], value) for name, value in statistics.items())
    with torch.no_grad():
        assert (fresh(batch) - expected).norm() < 0.9 * start


def test_default_start_names_the_one_to_take_for_convolutions() -> None:
    model = resnet()
    qat.convert_(model, PLAN, Affine)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no LayerNorm.*use\s+ptq_init.percentile_mse"):
        TTAQ(num_steps=1)(model, [images(4)])
    after = snapshot(model)
    assert all(
        torch.equal(after[k], v) if isinstance(v, Tensor) else after[k] == v
        for k, v in before.items()
    )


def test_gradients_reach_every_batch_norm_through_the_quantizers() -> None:
    model = calibrated()
    model.train()
    logits = model(images(8)).log_softmax(1)
    (-(logits.exp() * logits).sum(1)).mean().backward()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 8
    for norm in norms:
        assert norm.weight.grad is not None
        assert norm.weight.grad.abs().sum() > 0
        assert norm.bias.grad is not None


def test_checkpoint_returns_the_same_logits(tmp_path: Path) -> None:
    model = calibrated("deep").eval()
    qat.save(model, tmp_path / "model.ckpt")
    again = qat.load(tmp_path / "model.ckpt")
    with torch.no_grad():
        assert_close(again(images(3)), model(images(3)), rtol=0, atol=0)
    assert all(q.phase is Phase.QUANTIZE for _, q in quantizers(again))

"""Normalization layers are found by structure; batch statistics are the framework's own."""

import pytest
import torch
from torch import nn

import qat
from qat.tta import CoTTA, Norm, RoTTA, Tent
from qat.tta.adapter import Adapter
from qat.tta.norms import BatchStatistics, norm_layers, norm_parameters, restated
from qat.tta.overlay import Overlay
from tests.conftest import make_tiny_vit
from tests.qat.common import swin


def resnet() -> nn.Module:
    """A ResNet of ten layers on small images."""
    model = qat.timm_model("resnet10t", num_classes=5, data_config={"input_size": (3, 32, 32)})
    for _, layer in norm_layers(model):
        nn.init.normal_(layer.running_mean, 0.1, 0.1)  # type: ignore[arg-type]
        nn.init.uniform_(layer.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return model.eval()


class Wrapped(nn.Module):
    """A model under another name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model


def vit(depth: int) -> nn.Module:
    """A ViT of so many blocks."""
    return make_tiny_vit(depth=depth, embed_dim=16, num_heads=2)


def test_vit_has_two_norms_a_block_and_one_after_them() -> None:
    assert len(norm_layers(vit(12))) == 25


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped], ids=["plain", "wrapped"])
def test_top_of_a_vit_is_its_last_quarter_of_blocks_and_what_follows(wrap) -> None:  # type: ignore[no-untyped-def]
    kept = [name.removeprefix("inner.") for name, _ in norm_layers(wrap(vit(12)), top=False)]
    assert kept == [f"blocks.{i}.norm{j}" for i in range(9) for j in (1, 2)]


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped], ids=["plain", "wrapped"])
def test_top_of_a_resnet_is_its_last_layer(wrap) -> None:  # type: ignore[no-untyped-def]
    model = wrap(resnet())
    names = [name.removeprefix("inner.") for name, _ in norm_layers(model)]
    kept = [name.removeprefix("inner.") for name, _ in norm_layers(model, top=False)]
    assert kept == [name for name in names if not name.startswith("layer4")] != names


def test_top_of_a_swin_is_its_last_stage() -> None:
    kept = [name for name, _ in norm_layers(swin(), top=False)]
    assert any(name.startswith("layers.0.") for name in kept)
    assert not any(name.startswith("layers.1.") or name == "norm" for name in kept)


def test_model_without_norms_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to adapt"):
        norm_parameters(nn.Sequential(nn.Linear(2, 2)))


def test_restated_input_is_normalized_as_asked() -> None:
    x, mean, variance = torch.randn(4, 3, 5), torch.randn(3), torch.rand(3) + 0.5
    layer = nn.BatchNorm1d(3).eval()
    assert layer.running_mean is not None and layer.running_var is not None
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    found = layer(restated(x, mean, variance, layer.running_mean, layer.running_var, layer.eps))
    wanted = (x - mean[:, None]) / (variance[:, None] + layer.eps).sqrt()
    torch.testing.assert_close(found, wanted)


def test_full_share_equals_training_mode_and_no_share_evaluation_mode_with_gradients() -> None:
    model, images = resnet(), torch.randn(6, 3, 32, 32)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    outputs, grads = [], []
    on = Overlay(model, ["conv1.0.weight"])
    weight = on.flat().requires_grad_()
    for share in (1.0, 0.0):
        outputs.append(on(weight, images, BatchStatistics(share)))
        grads.append(torch.autograd.grad(outputs[-1].square().sum(), weight)[0])
    assert all(torch.equal(buffers[name], value) for name, value in model.named_buffers())
    torch.testing.assert_close(outputs[1], model(images), rtol=1e-4, atol=1e-5)
    model.train()
    wanted = model(images)
    grad = torch.autograd.grad(wanted.square().sum(), model.conv1[0].weight)[0]  # type: ignore[index,union-attr]
    torch.testing.assert_close(outputs[0], wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(grads[0], grad.flatten(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", [Norm(), Tent(), CoTTA(views=1), RoTTA(capacity=4)], ids=str)
def test_quantized_resnet_adapts_and_its_statistics_stay(method) -> None:  # type: ignore[no-untyped-def]
    model, images = resnet(), torch.rand(8, 3, 32, 32) * 2 - 1
    rule = {"weight": {"bits": 4, "granularity": "per_channel"}, "input": {"bits": 8}}
    qat.convert_(model, qat.Plan.from_list([{"pattern": "*", **rule}]), qat.quantizers.Affine)
    qat.calibrate(model, [images])
    state = {name: value.clone() for name, value in model.named_buffers()}
    adapter = Adapter(model, method)
    for size in (8, 8, 1):
        answer = adapter.adapt(images[:size])
        assert answer.outcome != "rolled back" and answer.logits.isfinite().all()
    assert adapter.counts.adapted >= 2 * method.adapts
    assert all(torch.equal(state[name], value) for name, value in model.named_buffers())


def test_norm_on_a_vit_is_refused_because_it_would_do_nothing() -> None:
    with pytest.raises(ValueError, match="needs batch normalization"):
        Adapter(vit(1), Norm())


def test_norm_moves_statistics_by_the_size_of_the_batch() -> None:
    model, images = resnet(), torch.randn(8, 3, 32, 32)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    on = Overlay(model, [])
    with torch.no_grad():
        on(on.flat(), images, BatchStatistics(8 / (8 + 16), seen=seen))
    layer = model.conv1[1]  # type: ignore[index]
    first = model.conv1[0](images)  # type: ignore[index,operator]
    wanted = 2 / 3 * layer.running_mean + 1 / 3 * first.mean((0, 2, 3))  # type: ignore[union-attr]
    torch.testing.assert_close(seen["conv1.1"][0], wanted.detach())

"""Stages of models for which no chain is written: found where there are any, else refused."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from ptq_init.mgrq import MGRQ
from qat import Plan
from qat.quantizers import Affine
from qat.reconstruct.stages import stages


class Blocks(nn.Module):
    """Embedding, blocks, classifier; `around` passes what the embedding gives around the blocks."""

    def __init__(self, around: bool = False, extra: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.steps = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), Second(8)) for _ in range(3))
        self.norm, self.classifier = nn.LayerNorm(8), nn.Linear(8, 4)
        self.around, self.extra = around, extra
        if shared:
            self.steps[1][1] = self.steps[0][1]

    def example_inputs(self, device: str) -> tuple[Tensor]:
        return (torch.zeros(1, 5, 6, device=device),)

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.embed(x)
        for step in self.steps:
            x = step[1](step[0](x), x) if self.extra else step(x)
        x = self.norm(x + first if self.around else x)
        return self.classifier(x.mean(1))


class Second(nn.Linear):
    """A residual layer; its second input is not used."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)

    def forward(self, x: Tensor, _: Any = None) -> Tensor:
        return x + super().forward(x)


def test_blocks_are_found_with_what_comes_before_and_after() -> None:
    model, x = Blocks().eval(), torch.randn(3, 5, 6)
    chain = stages(model)
    names = [stage.name for stage in chain]
    assert names == ["before steps", "steps.0", "steps.1", "steps.2", "after steps"]
    assert chain[0].modules == (model.embed,)
    assert chain[-1].modules == (model.norm, model.classifier)
    y = x
    for stage in chain:
        y = stage.forward(y)
    assert torch.equal(y, model(x))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_channels_are_where_the_convolutions_have_them() -> None:
    convnext = qat.timm_model("convnext_atto")
    assert {stage.channels for stage in stages(convnext)[:-1]} == {1}
    swin = qat.timm_model("swin_tiny_patch4_window7_224", model_args={"depths": (1, 1, 1, 1)})
    assert {stage.channels for stage in stages(swin)} == {-1}


def test_search_for_blocks_leaves_a_forward_of_ones_own() -> None:
    model, x = Blocks().eval(), torch.randn(3, 5, 6)
    own = model.steps[1].forward
    model.steps[1].forward = lambda x: 2 * own(x)
    before = model(x)
    with contextlib.suppress(ValueError):
        stages(model)
    assert torch.equal(model(x), before)


def test_gradients_reach_every_stage() -> None:
    model, y = Blocks().eval(), torch.randn(3, 5, 6)
    for stage in stages(model):
        y = stage.forward(y)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", ["around", "extra", "shared"])
def test_model_whose_blocks_are_no_chain_is_refused_before_any_work(kind: str) -> None:
    model, x = Blocks(**{kind: True}).eval(), torch.randn(2, 5, 6)
    qat.convert_(model, Plan.uniform(8, 8), Affine)
    before = model(x)
    seen: list[Tensor] = []

    def batches() -> Any:
        seen.append(x)
        yield x

    with pytest.raises(
        ValueError, match="cannot divide the model into stages: no sequence of like"
    ):
        MGRQ(num_steps=1)(model, batches())
    assert not seen
    assert torch.equal(model(x), before)


OTHERS = {
    "test_convnext": {"img_size": None},
    "vit_small_patch16_dinov3": {
        "img_size": 64,
        "model_args": {"depth": 2, "embed_dim": 48, "num_heads": 2},
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_mgrq_reconstructs_a_model_of_another_family(name: str) -> None:
    """DINOv3's blocks are given the rotations of RoPE beside their input."""
    torch.manual_seed(0)
    model = qat.timm_model(name, num_classes=5, **OTHERS[name]).eval()
    nn.init.normal_(model.get_classifier().weight)
    images = torch.randn(4, 3, 64, 64)
    exact = model(images)
    qat.convert_(model, Plan.uniform(8, 8), Affine)
    MGRQ(num_steps=2, batch_size=2, num_init=4)(model, [images])
    assert (model(images) - exact).norm() / exact.norm() < 0.3

"""Transformers of `diffusers` convert, calibrate and run as our own DiT does; random weights."""

import pytest
import torch
from torch import Tensor, nn

import qat
from ptq_init.lrq_dit import LRQDiT
from qat import Phase, Plan, set_phase
from qat.quantizers import quantizers
from tests.qat.diffusion.common import TWIN

pytest.importorskip("diffusers", reason="needs the extra `diffusion`")

COMMON = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
}
PLAN = Plan.from_list(
    [
        {"pattern": "transformer_blocks.*.norm1*", "reason": "modulation, in float as in LRQ-DiT"},
        {
            "pattern": "transformer_blocks.*",
            "weight": {"bits": 4, "signed": False, "granularity": "per_channel"},
            "input": {"bits": 8},
        },
    ]
)


def _dit() -> tuple[nn.Module, tuple[Tensor, ...], int]:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(**COMMON, num_embeds_ada_norm=1000)
    batch = (torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([0, 7]))
    return model, batch, 6  # q, k, v, out, two of the feed-forward


def _pixart() -> tuple[nn.Module, tuple[Tensor, ...], int]:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        **COMMON, cross_attention_dim=32, caption_channels=24, use_additional_conditions=False
    )
    batch = (torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24), torch.tensor([10, 900]))
    return model, batch, 10  # twice q, k, v, out, and two of the feed-forward


@pytest.mark.parametrize("build", [_dit, _pixart])
@pytest.mark.filterwarnings("ignore")
def test_linear_layers_of_the_blocks_convert_and_rotate(build) -> None:
    model, batch, per_block = build()
    model = model.eval()
    rules = PLAN.rules if build is _dit else PLAN.rules[1:]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
        exact = model(*batch).sample
        qat.convert_(model, Plan(tuple(rules)), TWIN)
        assert torch.equal(model(*batch).sample, exact)
        LRQDiT()(model, [batch])
        assert len(list(quantizers(model))) == 2 * 2 * per_block
        quantized = model(*batch).sample
        assert 1e-4 < (quantized - exact).norm() / exact.norm() < 0.5
        set_phase(model, Phase.FLOAT)
        assert (model(*batch).sample - exact).norm() / exact.norm() < 1e-4

"""Attention quantizers on the attention maps of a real ViT, by the error of the product A V."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from qat import Phase, QuantSpec
from qat.models import timm_model
from qat.quantizers import Affine, Log2, LogSqrt2, PercentileMSE, TanQ

ASSETS = Path(os.environ.get("LOWBIT_ASSETS", "/nowhere"))
FACTORIES = {
    "uniform": partial(Affine, observer=PercentileMSE),
    "log2": partial(Log2, zero="last"),
    "log-sqrt2": partial(LogSqrt2, zero="last"),
    "log-sqrt2 + 1 code": partial(LogSqrt2, zero="extra"),
    "log-sqrt2 clipped": partial(LogSqrt2, zero="none"),
    "TanQ T2": partial(TanQ, form="t2"),
    "TanQ T1": TanQ,
}


@pytest.fixture(scope="module")
def products() -> list[tuple[Tensor, Tensor]]:
    """Attention map and values of each block, on eight real images."""
    model = timm_model(
        "vit_tiny_patch16_224", weights=str(ASSETS / "weights/vit_tiny_patch16_224.safetensors")
    ).eval()
    transform = create_transform(**model.card.preprocessing.to_dict())
    paths = sorted((ASSETS / "data/imagenet-sample/val").rglob("*.jpg"))[::61][:8]
    x = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    found = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        q, k, v = output.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found.append(((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1), v))

    for block in model.blocks:
        block.attn.qkv.num_heads = block.attn.num_heads
        block.attn.qkv.register_forward_hook(keep)
    with torch.no_grad():
        model(x)
    return found


def _decibel(products: list[tuple[Tensor, Tensor]], name: str, bits: int) -> float:
    """Mean over blocks of the signal to noise ratio of A V."""
    ratios = []
    for attention, values in products:
        spec = QuantSpec(bits, signed=False)
        quantizer = FACTORIES[name](spec, (attention.shape[1], 1, 1))
        quantizer.observe(attention)
        quantizer.freeze()
        quantizer.phase = Phase.QUANTIZE
        exact = attention @ values
        noise = quantizer(attention).detach() @ values - exact
        ratios.append(10 * torch.log10(exact.square().sum() / noise.square().sum()))
    return torch.stack(ratios).mean().item()


def _reverse_tangent(attention: Tensor, bits: int) -> Tensor:
    """Form T3: arctangent forward, tangent back, at the best of sixty steepnesses."""
    scale, top = attention.max(), 2**bits - 1
    best, chosen = None, attention
    for steepness in torch.logspace(-1, 4, 60):
        step = torch.atan(steepness) / top
        codes = (torch.atan(steepness * attention / scale) / step).round()
        output = scale * torch.tan(codes * step) / steepness
        error = (output - attention).square().sum()
        if best is None or error < best:
            best, chosen = error, output
    return chosen


@pytest.mark.slow
@pytest.mark.skipif(not ASSETS.exists(), reason="no LOWBIT_ASSETS")
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_tangent_forward_beats_arctangent_forward(
    bits: int, products: list[tuple[Tensor, Tensor]]
) -> None:
    ratios = []
    for attention, values in products:
        exact = attention @ values
        noise = _reverse_tangent(attention, bits) @ values - exact
        ratios.append(10 * torch.log10(exact.square().sum() / noise.square().sum()))
    reverse = torch.stack(ratios).mean().item()
    print(bits, "T3", round(reverse, 2))
    assert _decibel(products, "TanQ T1", bits) > reverse


@pytest.mark.slow
@pytest.mark.skipif(not ASSETS.exists(), reason="no LOWBIT_ASSETS")
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_tanq_beats_log_sqrt2_on_real_attention(
    bits: int, products: list[tuple[Tensor, Tensor]]
) -> None:
    """At equal storage; log-sqrt2 as in RepQ-ViT's code has a code more than `bits` hold."""
    found = {name: _decibel(products, name, bits) for name in FACTORIES}
    print(bits, {name: round(ratio, 2) for name, ratio in found.items()})
    assert found["TanQ T1"] > found["log-sqrt2"]
    assert found["TanQ T1"] > found["log-sqrt2 clipped"]
    assert found["TanQ T1"] > found["log2"]

"""RepQ-ViT: its algebra, and an independent re-statement of the official code, loops and all."""

import math
from functools import partial

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.testing import assert_close

from ptq_init.dopq_vit import DopQCalibration
from ptq_init.repq_vit import (
    RepQViT,
    calibrate_channels,
    norm_pairs,
    reparametrize,
    reparametrize_norms,
    rounded_mean_grid,
)
from qat import Phase, Plan, QuantSpec, convert_, set_phase
from qat.quantizers import Affine, LogSqrt2, PercentileMSE, PerOperand, TanQ
from tests.ptq_init.common import images, plan, tiny_swin, tiny_vit

LOG = PerOperand(attention=LogSqrt2)


# The re-statement: plain functions over tensors, nothing of ours but the float weights.


def _quantile(values: Tensor, p: float) -> float:
    ordered = values.flatten().sort().values.double()
    rank = p * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (ordered[above] - ordered[below]) * (rank - below))


def _uniform(x: Tensor, s: Tensor, z: Tensor, bits: int) -> Tensor:
    return s * (torch.clamp(torch.round(x / s) + z, 0, 2**bits - 1) - z)


def _search(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    best = None
    for p in (0.999, 0.9999, 0.99999):
        high = torch.tensor(_quantile(x, p), dtype=torch.float64)
        low = torch.tensor(_quantile(x, 1 - p), dtype=torch.float64)
        s = (high - low) / (2**bits - 1)
        z = torch.round(-low / s)
        error = (_uniform(x, s, z, bits) - x).square().mean()
        if best is None or error < best[0]:
            best = (error, s, z)
    return best[1], best[2]


def _search_channels(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Of rows."""
    found = [_search(row, bits) for row in x]
    return torch.stack([s for s, _ in found]), torch.stack([z for _, z in found])


def _log(a: Tensor, s: Tensor, bits: int) -> Tensor:
    code = torch.round(-2 * torch.log2(a / s))
    flushed = code >= 2**bits
    code = code.clamp(0, 2**bits - 1)
    value = s * torch.pow(2.0, -code / 2)
    return torch.where(flushed, torch.zeros_like(value), value)


def _search_log(a: Tensor, bits: int) -> Tensor:
    best = None
    for p in (0.999, 0.9999, 0.99999):
        s = torch.tensor(_quantile(a, p), dtype=torch.float64)
        error = (_log(a, s, bits) - a).square().mean()
        if best is None or error < best[0]:
            best = (error, s)
    return best[1]


class Restated:
    """A ViT of one class token, quantized by the official algorithm."""

    def __init__(self, model: VisionTransformer, bits: int) -> None:
        self.model, self.bits = model, bits
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        self.weights: dict[str, Tensor] = {}
        self.channel_wise = True

    def operand(self, name: str, x: Tensor, bits: int | None = None) -> Tensor:
        bits = bits or self.bits
        if name not in self.found:
            self.found[name] = _search(x, bits)
        return _uniform(x, *self.found[name], bits)

    def layer_weight(self, name: str, w: Tensor) -> Tensor:
        if name not in self.weights:
            s, z = _search_channels(w.flatten(1), self.bits)
            self.weights[name] = _uniform(w.flatten(1), s[:, None], z[:, None], self.bits)
        return self.weights[name].view_as(w)

    def behind_norm(self, name: str, x: Tensor) -> Tensor:
        if name not in self.found:
            self.found[name] = _search_channels(x.flatten(0, -2).T, self.bits)
        return _uniform(x, *self.found[name], self.bits)

    def forward(self, x: Tensor) -> Tensor:
        m = self.model
        conv = m.patch_embed.proj
        x = nn.functional.conv2d(
            self.operand("patch_embed.proj", x, 8),
            self.layer_weight("patch_embed.proj", conv.weight),
            conv.bias,
            conv.stride,
        )
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([m.cls_token.expand(len(x), -1, -1), x], 1) + m.pos_embed
        for i, block in enumerate(m.blocks):
            at = f"blocks.{i}"
            a = block.attn
            h = self.behind_norm(f"{at}.attn.qkv", block.norm1(x))
            h = h @ self.layer_weight(f"{at}.attn.qkv", a.qkv.weight).T + a.qkv.bias
            q, k, v = h.view(*h.shape[:2], 3, a.num_heads, a.head_dim).permute(2, 0, 3, 1, 4)
            logits = self.operand(f"{at}.q", q) @ self.operand(f"{at}.k", k).transpose(-2, -1)
            attention = (logits * a.scale).softmax(-1)
            if f"{at}.a" not in self.found:
                self.found[f"{at}.a"] = (_search_log(attention, self.bits),) * 2
            attention = _log(attention, self.found[f"{at}.a"][0], self.bits)
            h = (attention @ self.operand(f"{at}.v", v)).transpose(1, 2).flatten(2)
            h = self.operand(f"{at}.attn.proj", h)
            x = x + h @ self.layer_weight(f"{at}.attn.proj", a.proj.weight).T + a.proj.bias
            h = self.behind_norm(f"{at}.mlp.fc1", block.norm2(x))
            h = h @ self.layer_weight(f"{at}.mlp.fc1", block.mlp.fc1.weight).T + block.mlp.fc1.bias
            h = self.operand(f"{at}.mlp.fc2", nn.functional.gelu(h))
            weight = self.layer_weight(f"{at}.mlp.fc2", block.mlp.fc2.weight)
            x = x + h @ weight.T + block.mlp.fc2.bias
        x = self.operand("head", m.norm(x)[:, 0])
        return x @ self.layer_weight("head", m.head.weight).T + m.head.bias

    @torch.no_grad()
    def run(self, x: Tensor) -> Tensor:
        self.forward(x)
        for i, block in enumerate(self.model.blocks):
            for norm, layer, name in (
                (block.norm1, block.attn.qkv, f"blocks.{i}.attn.qkv"),
                (block.norm2, block.mlp.fc1, f"blocks.{i}.mlp.fc1"),
            ):
                s, z = self.found[name]
                common_s, common_z = s.mean(), z.mean()
                low, common_low = -z * s, -common_z * common_s
                ratio = s / common_s
                move = low / ratio - common_low
                norm.weight.data = norm.weight / ratio
                norm.bias.data = norm.bias / ratio - move
                layer.weight.data = layer.weight * ratio
                layer.bias.data = layer.bias + layer.weight @ move
                self.found[name] = (common_s, common_z)
                del self.weights[name]
        return self.forward(x)


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("seed", [0, 1])
def test_code_mode_agrees_with_a_plain_restatement(bits: int, seed: int) -> None:
    # In double precision: a difference in the last bit must not decide a rounding.
    batch = images(4, seed).double()
    ours, theirs = tiny_vit(seed).double(), Restated(tiny_vit(seed).double(), bits)
    convert_(ours, plan(bits), LOG)
    ours.double()
    RepQViT(mode="code")(ours, [batch])
    expected = theirs.run(batch)
    for name in ("patch_embed.proj", "blocks.1.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc2"):
        quantizer = ours.get_submodule(f"{name}.input_quantizer")
        assert_close(quantizer.scale, theirs.found[name][0], atol=1e-5, rtol=1e-5)
        assert_close(quantizer.zero_point, theirs.found[name][1], atol=1e-5, rtol=1e-5)
    for name, operand in (("q", "qk.left"), ("k", "qk.right"), ("a", "av.left"), ("v", "av.right")):
        quantizer = ours.get_submodule(f"blocks.1.attn.{operand}_quantizer")
        assert_close(quantizer.scale, theirs.found[f"blocks.1.{name}"][0], atol=1e-5, rtol=1e-5)
    assert_close(ours(batch), expected, atol=1e-5, rtol=1e-5)

"""RepQ-ViT: its algebra, and an independent re-statement of the official code, loops and all."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.testing import assert_close

from ptq_init.dopq_vit import DopQCalibration
from ptq_init.minmax import MinMaxRange
from ptq_init.percentile_mse import PercentileMSERange
from ptq_init.repq_vit import (
    RepQViT,
    calibrate_channels,
    norm_pairs,
    reparametrize,
    reparametrize_norms,
    rounded_mean_grid,
)
from qat import Phase, Plan, QuantSpec, convert_, load, save, set_phase
from qat.calibrate import untouched_on_error
from qat.layers import QuantLinear
from qat.models import timm_model
from qat.quantizers import (
    LSQ,
    Affine,
    LogSqrt2,
    MinMax,
    PercentileMSE,
    PerOperand,
    Quantizer,
    TanQ,
    quantizers,
)
from tests.ptq_init.common import Memory, images, plan, tiny_swin, tiny_vit, uneven

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


# Not (3, 0): there a product of two 3-bit operands lies exactly between two steps.
@pytest.mark.parametrize(("bits", "seed"), [(3, 1), (3, 2), (4, 0), (4, 1), (6, 0), (6, 1)])
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


def _calibrated(model: nn.Module, bits: int, batch: Tensor) -> nn.Module:
    """Converted, with a scale for each channel behind the norms."""
    convert_(model, plan(bits), LOG)
    calibrate_channels(model, batch, PercentileMSE)
    return model


def _float_logits(model: nn.Module, batch: Tensor) -> Tensor:
    phases = [(q, q.phase) for _, q in quantizers(model)]
    set_phase(model, Phase.FLOAT)
    with torch.no_grad():
        logits = model(batch)
    for quantizer, phase in phases:
        quantizer.phase = phase
    return logits


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
@pytest.mark.parametrize("mode", ["code", "paper"])
def test_reparametrization_keeps_the_float_function(
    build: Callable[[], nn.Module], mode: Literal["code", "paper"]
) -> None:
    model, batch = build().double(), images(2).double()
    with torch.no_grad():
        before = model(batch)
    convert_(model, plan(4), LOG)
    model.double()
    RepQViT(mode=mode)(model, [batch])
    assert_close(_float_logits(model, batch), before, atol=1e-9, rtol=1e-9)
    assert all(q.phase is Phase.QUANTIZE for _, q in quantizers(model))


def test_swin_patch_merging_is_reparametrized_and_given_a_bias_that_a_checkpoint_keeps(
    tmp_path: Path,
) -> None:
    model, batch = tiny_swin(), images(2)
    convert_(model, plan(4), LOG)
    RepQViT()(model, [batch])
    reduction = model.layers[1].downsample.reduction
    assert reduction.bias.abs().max() > 0
    assert reduction.input_quantizer.scale.shape == ()
    save(model, tmp_path / "model.ckpt")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "model.ckpt")(batch), model(batch))


@given(
    scales=st.lists(st.floats(0.01, 10), min_size=6, max_size=6),
    zero_points=st.lists(st.integers(-20, 20), min_size=6, max_size=6),
    common=st.tuples(st.floats(0.01, 10), st.integers(-20, 20)),
)
def test_codes_and_output_are_the_same_before_and_after(
    scales: list[float], zero_points: list[int], common: tuple[float, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    norm, linear = nn.LayerNorm(6).double(), nn.Linear(6, 4, bias=False).double()
    layer = QuantLinear(linear)
    x = torch.randn(5, 6, generator=generator).double()
    s, z = torch.tensor(scales).double(), torch.tensor(zero_points).double()
    one_s, one_z = torch.tensor(common[0]).double(), torch.tensor(float(common[1])).double()
    with torch.no_grad():
        norm.weight.uniform_(0.1, 3, generator=generator)
        norm.bias.normal_(generator=generator)
        before, output = norm(x) / s + z, layer(norm(x))
        reparametrize(norm, layer, s, z, one_s, one_z)
        assert_close(norm(x) / one_s + one_z, before)
        assert_close(layer(norm(x)), output)


@pytest.mark.parametrize("factor", [0.2, 3.0])
def test_common_scale_does_not_matter_for_a_fixed_zero_point(factor: float) -> None:
    """So MOSF without training can act through the zero point only."""
    batch, logits = images(4).double(), []
    for scaled in (1.0, factor):
        model = tiny_vit().double()
        convert_(model, plan(4), LOG)
        model.double()
        pairs = calibrate_channels(model, batch, PercentileMSE)

        def common(s: Tensor, z: Tensor, by: float = scaled) -> tuple[Tensor, Tensor]:
            return s.mean() * by, z.mean().round()

        reparametrize_norms(model, batch, pairs, common, PercentileMSE)
        with torch.no_grad():
            logits.append(model(batch))
    assert_close(*logits, atol=1e-9, rtol=1e-9)


def test_paper_mode_has_whole_zero_points_and_code_mode_has_not() -> None:
    wholes = {}
    for mode in ("paper", "code"):
        model = tiny_vit()
        convert_(model, plan(4), LOG)
        RepQViT(mode=mode)(model, [images(4)])
        points = [pair.linear.input_quantizer.zero_point for pair in norm_pairs(model)]
        wholes[mode] = all(bool(point == point.round()) for point in points)
    assert wholes == {"paper": True, "code": False}


def test_fractional_zero_point_has_two_partial_steps_and_no_integer_codes() -> None:
    quantizer = Affine(QuantSpec(2, signed=False), (1,))
    quantizer.set_grid(torch.tensor(1.0), torch.tensor(0.25))
    x = torch.arange(-3.0, 6)
    assert quantizer.fake_quantize(x).unique().tolist() == [-0.25, 0.0, 1.0, 2.0, 2.75]
    with pytest.raises(ValueError, match="fraction"):
        quantizer.codes(x)


def test_constant_and_dead_channels_cost_no_accuracy() -> None:
    errors = []
    for dead in (False, True):
        model, batch = tiny_vit(), images(4)
        with torch.no_grad():
            for block in model.blocks if dead else ():
                block.norm1.weight[3:6] = 0
                block.norm1.bias[3] = 0
                block.norm1.bias[4] = 1e-20
                block.norm1.bias[5] = 2.5
                block.mlp.fc1.weight[0] = 0
                block.mlp.fc1.weight[1] = 0.7
            before = model(batch)
            convert_(model, plan(8), LOG)
            RepQViT()(model, [batch])
            errors.append((model(batch) - before).norm() / before.norm())
    assert errors[1] < 1.2 * errors[0]


def test_one_image_is_enough() -> None:
    model = tiny_vit()
    convert_(model, plan(6), LOG)
    RepQViT()(model, [images(1)])
    with torch.no_grad():
        assert torch.isfinite(model(images(2, seed=5))).all()


def test_numbers_of_16_bits_are_refused() -> None:
    model = tiny_vit().bfloat16()
    convert_(model, plan(6), LOG)
    with pytest.raises(
        ValueError, match=r"torch\.bfloat16 by whole percents; quantize model\.float"
    ):
        RepQViT()(model, [images(1).bfloat16()])


@pytest.mark.parametrize(
    "initialise",
    [MinMaxRange(), PercentileMSERange(), RepQViT(), DopQCalibration()],
    ids=lambda initialise: type(initialise).__name__,
)
@pytest.mark.parametrize("broken", ["nan", "none"])
def test_unusable_images_are_refused_and_the_model_is_untouched(
    initialise: Callable[..., None], broken: str
) -> None:
    model = tiny_vit()
    convert_(model, plan(4), LOG)
    before = {key: copy.deepcopy(value) for key, value in model.state_dict().items()}
    bad = images(2)
    bad[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"NaN|at least one batch"):
        initialise(model, [images(2), bad] if broken == "nan" else [])
    after = model.state_dict()
    assert list(after) == list(before)
    for key, value in before.items():
        same = torch.equal(after[key], value) if isinstance(value, Tensor) else after[key] == value
        assert same, key


def test_failure_in_the_middle_brings_everything_back() -> None:
    """Stand-in quantizers, folded norms and new biases included."""
    model = tiny_swin()
    convert_(model, plan(4), LOG)
    before = copy.deepcopy(model.state_dict())
    modules = [type(module) for module in model.modules()]

    def fail(s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        if len(s) > 24:
            raise RuntimeError("stopped")
        return rounded_mean_grid(s, z)

    with pytest.raises(RuntimeError, match="stopped"), untouched_on_error(model):
        pairs = calibrate_channels(model, images(2), PercentileMSE)
        reparametrize_norms(model, images(2), pairs, fail, PercentileMSE)
    assert [type(module) for module in model.modules()] == modules
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items() if isinstance(v, Tensor))


def test_model_without_such_norms_is_refused() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 4))
    model.example_inputs = lambda device: (torch.zeros(1, 3, 8, 8, device=device),)
    convert_(model, Plan.from_list([{"pattern": "*", "input": {"bits": 4}}]), Affine)
    with pytest.raises(ValueError, match=r"no LayerNorm to reparametrize.*percentile_mse"):
        RepQViT()(model, [images(2)])


def test_padding_between_norm_and_layer_is_noticed() -> None:
    """timm pads windows after the norm; padding is not moved with the channels."""
    model = timm_model(
        "swin_tiny_patch4_window7_224",
        num_classes=7,
        img_size=20,
        model_args={"depths": (2,), "embed_dim": 24, "num_heads": (2,), "patch_size": 2,
                    "window_size": 4},
    )  # fmt: skip
    uneven(model, 0)
    convert_(model, plan(4), LOG)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="changes the float logits"):
        RepQViT()(model, [torch.randn(2, 3, 20, 20, generator=generator)])


@pytest.mark.parametrize("factory", [LSQ, partial(Affine, observer=MinMax)], ids=["lsq", "signed"])
def test_other_quantizers_start_from_it_too(factory: Callable[..., Quantizer]) -> None:
    """LayerNorm outputs are placed so that a grid around zero fits every channel."""
    signed = {"bits": 4}
    rules = [{"pattern": "blocks.*", "weight": signed, "input": signed}]
    errors = {}
    for initialise in (MinMaxRange(), RepQViT()):
        model, batch = tiny_vit(), images(8)
        with torch.no_grad():
            before = model(batch)
        convert_(model, Plan.from_list(rules), factory)
        initialise(model, [batch])
        assert_close(_float_logits(model, batch), before, atol=1e-3, rtol=1e-3)
        with torch.no_grad():
            errors[type(initialise)] = (model(batch) - before).norm()
    assert errors[RepQViT] < errors[MinMaxRange]


def test_dopq_rounds_the_median_zero_point() -> None:
    model = tiny_vit()
    convert_(model, plan(4), PerOperand(attention=TanQ))
    DopQCalibration()(model, [images(4)])
    channels = _calibrated(tiny_vit(), 4, images(4)).blocks[0].attn.qkv.input_quantizer
    found = model.blocks[0].attn.qkv.input_quantizer
    assert_close(found.scale, channels.scale.median())
    assert_close(found.zero_point, channels.zero_point.median().round())


class Reader(nn.Module):
    """Three LayerNorms: read by a layer alone, by an activation, and by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.alone, self.bent, self.shared = (nn.LayerNorm(8) for _ in range(3))
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def example_inputs(self, device: str) -> tuple[Tensor]:
        return (torch.zeros(1, 5, 8, device=device),)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(self.alone(x).transpose(1, 2).contiguous().transpose(1, 2))
        x = x + self.b(self.bent(x).relu())
        y = self.shared(x)
        return self.c(y) + self.d(y)


def test_norm_is_folded_where_its_only_reader_is_a_layer_and_the_count_is_told() -> None:
    model, x = Reader(), torch.randn(6, 5, 8)
    torch.nn.init.normal_(model.alone.weight)
    exact = model(x)
    convert_(model, Plan.uniform(8, 8), Affine)
    assert [pair.name for pair in norm_pairs(model)] == ["a"]
    journal = Memory()
    RepQViT()(model, [x], journal)
    assert (journal.notes["norms_folded"], journal.notes["norms"]) == (1, 3)
    assert model.a.bias is not None and model.b.bias is None
    assert (model(x) - exact).norm() / exact.norm() < 0.02


def test_initialiser_that_fails_gives_a_layer_without_bias_none() -> None:
    model, x = Reader(), torch.randn(6, 5, 8)
    convert_(model, Plan.uniform(8, 8), Affine)
    exact = model(x)
    with pytest.raises(ZeroDivisionError), untouched_on_error(model):
        RepQViT()(model, [x])
        _ = 1 / 0
    assert model.a.bias is None
    assert torch.equal(model(x), exact)

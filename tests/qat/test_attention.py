"""Attention twins: timm's bits while in float, the written-out formula while quantizing."""

import inspect

import pytest
import torch
from timm.layers.attention import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from qat import Operand, Phase, QuantSpec, set_phase
from qat.attention import QuantAttention, QuantWindowAttention
from qat.convert import HANDLERS, Maker
from qat.layers import QuantMatmul
from qat.plan import Rule
from qat.quantizers import Affine

TOKENS, DIM, HEADS = 16, 24, 3
SPEC = QuantSpec(4)
RULE = Rule("*", query=SPEC, key=SPEC, value=SPEC, attention=QuantSpec(4, signed=False))
FUSED = pytest.mark.parametrize("fused", [True, False])
VARIANTS = pytest.mark.parametrize(
    "variant",
    [
        {},
        {"qkv_bias": True, "qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
        pytest.param(
            {"gated": True, "attn_head_dim": 10, "dim_out": 12},
            marks=pytest.mark.skipif(
                "gated" not in inspect.signature(Attention).parameters,
                reason="this timm has no gated attention",
            ),
        ),
    ],
    ids=["plain", "normed", "gated"],
)


def _twin(attention: nn.Module, rule: Rule = RULE) -> nn.Module:
    return HANDLERS[type(attention)].build(attention, Maker(rule, Affine))


def _calibrated(twin: nn.Module, *inputs: Tensor | None) -> nn.Module:
    set_phase(twin, Phase.OBSERVE)
    twin(*inputs)
    for product in (twin.qk, twin.av):
        product.left_quantizer.freeze()
        product.right_quantizer.freeze()
    set_phase(twin, Phase.QUANTIZE)
    return twin


def _attention(fused: bool, **arguments: object) -> Attention:
    attention = Attention(DIM, HEADS, **arguments)
    attention.fused_attn = fused
    return attention


def _window_attention(fused: bool, **arguments: object) -> WindowAttention:
    attention = WindowAttention(DIM, HEADS, window_size=4, **arguments)
    nn.init.normal_(attention.relative_position_bias_table)
    attention.fused_attn = fused
    return attention


def _window_mask() -> Tensor:
    mask = torch.zeros(2, TOKENS, TOKENS)
    mask[1, :8, 8:] = mask[1, 8:, :8] = -float("inf")
    return mask


def _split(attention: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    heads = attention.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return tuple(heads)


@FUSED
@VARIANTS
@pytest.mark.parametrize("masked", [True, False])
def test_float_twin_gives_the_bits_of_timm(
    fused: bool, variant: dict[str, object], masked: bool
) -> None:
    attention, x = _attention(fused, **variant), torch.randn(2, TOKENS, DIM)
    mask = torch.randn(TOKENS, TOKENS) if masked else None
    assert torch.equal(_twin(attention)(x, mask), attention(x, mask))


@FUSED
@pytest.mark.parametrize("masked", [True, False])
def test_float_window_twin_gives_the_bits_of_timm(fused: bool, masked: bool) -> None:
    attention, x = _window_attention(fused), torch.randn(4, TOKENS, DIM)
    mask = _window_mask() if masked else None
    assert torch.equal(_twin(attention)(x, mask), attention(x, mask))


@FUSED
@pytest.mark.parametrize("make", [_attention, _window_attention])
def test_float_twin_drops_what_timm_drops_in_training(fused: bool, make: type) -> None:
    attention = make(fused, attn_drop=0.5, proj_drop=0.2).train()
    twin, x = _twin(attention).train(), torch.randn(2, TOKENS, DIM)
    torch.manual_seed(3)
    expected = attention(x)
    torch.manual_seed(3)
    assert torch.equal(twin(x), expected)


def test_quantized_attention_equals_the_written_out_formula() -> None:
    attention, x = _attention(True), torch.randn(2, TOKENS, DIM)
    mask = torch.randn(TOKENS, TOKENS)
    twin = _calibrated(_twin(attention), x, mask)
    q, k, v = _split(attention, x)
    qk, av = twin.qk, twin.av
    logits = qk.left_quantizer(q) @ qk.right_quantizer(k).mT * (DIM // HEADS) ** -0.5
    weights = av.left_quantizer((logits + mask).softmax(-1))
    context = (weights @ av.right_quantizer(v)).transpose(1, 2).flatten(2)
    assert torch.equal(twin(x, mask), attention.proj(context))
    assert not torch.equal(twin(x, mask), attention(x, mask))


def test_quantized_window_attention_equals_the_written_out_formula() -> None:
    attention, x, mask = _window_attention(True), torch.randn(4, TOKENS, DIM), _window_mask()
    twin = _calibrated(_twin(attention), x, mask)
    q, k, v = _split(attention, x)
    qk, av = twin.qk, twin.av
    logits = qk.left_quantizer(q) @ qk.right_quantizer(k).mT * (DIM // HEADS) ** -0.5
    logits = logits + attention._get_rel_pos_bias()
    logits = logits + mask[[0, 1, 0, 1]].unsqueeze(1)  # windows of image 0, then of image 1
    weights = av.left_quantizer(logits.softmax(-1))
    context = (weights @ av.right_quantizer(v)).transpose(1, 2).flatten(2)
    assert torch.equal(twin(x, mask), attention.proj(context))


def test_masked_tokens_have_no_influence_while_quantizing() -> None:
    x, mask = torch.randn(2, TOKENS, DIM), _window_mask()
    twin = _calibrated(_twin(_window_attention(True)), x, mask)
    other = x.clone()
    other[1, 8:] += 1  # the masked half of the second window
    before, after = twin(x, mask), twin(other, mask)
    assert torch.equal(before[1, :8], after[1, :8])
    assert not torch.equal(before[1, 8:], after[1, 8:])


@FUSED
def test_observing_twin_computes_the_float_result(fused: bool) -> None:
    attention, x = _attention(fused), torch.randn(2, TOKENS, DIM)
    twin = _twin(attention)
    set_phase(twin, Phase.OBSERVE)
    torch.testing.assert_close(twin(x), attention(x))


@pytest.mark.parametrize("operand", ["query", "key", "value", "attention"])
def test_one_quantized_operand_suffices_to_leave_the_fused_path(operand: str) -> None:
    attention, x = _attention(True), torch.randn(2, TOKENS, DIM)
    twin = _twin(attention, Rule("*", **{operand: QuantSpec(2)}))
    assert torch.equal(twin(x), attention(x))
    product = twin.qk if operand in ("query", "key") else twin.av
    left = operand in ("query", "attention")
    quantizer = product.left_quantizer if left else product.right_quantizer
    assert quantizer.operand is Operand(operand)
    quantizer.phase = Phase.QUANTIZE
    assert not torch.allclose(twin(x), attention(x))


def test_context_module_acts_while_quantizing_only() -> None:
    class PlusQueries(nn.Module):
        def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return x + q

    attention, x = _attention(True), torch.randn(2, TOKENS, DIM)
    products = (QuantMatmul(transpose_right=True), QuantMatmul(Affine(SPEC, (HEADS, 1, 1))))
    twin = QuantAttention(attention, *products, PlusQueries())
    plain = QuantAttention(attention, *products)
    assert torch.equal(twin(x), attention(x))
    set_phase(twin, Phase.OBSERVE)
    torch.testing.assert_close(twin(x), attention(x))
    set_phase(twin, Phase.QUANTIZE)
    queries = _split(attention, x)[0].transpose(1, 2).flatten(2) @ attention.proj.weight.T
    torch.testing.assert_close(twin(x), plain(x) + queries)


def test_causal_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="no causal form"):
        _twin(_attention(True))(torch.randn(1, TOKENS, DIM), is_causal=True)


def test_window_twin_keeps_names_and_does_not_save_the_position_index() -> None:
    attention = _window_attention(True)
    names = set(_twin(attention).state_dict())
    assert set(attention.state_dict()) <= names
    assert isinstance(_twin(attention), QuantWindowAttention)
    assert "relative_position_index" not in names


@pytest.mark.parametrize("product", ["qk", "av"])
@pytest.mark.parametrize("side", ["left_quantizer", "right_quantizer"])
def test_each_operand_of_a_product_can_be_quantized_alone(product: str, side: str) -> None:
    attention = _attention(fused=True)
    x = torch.randn(2, TOKENS, DIM)
    expected = attention(x)
    twin = _calibrated(_twin(attention), x)
    set_phase(twin, Phase.FLOAT)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    getattr(getattr(twin, product), side).phase = Phase.QUANTIZE
    assert (twin(x) - expected).abs().max() > 1e-4

"""Products: the model's bits while in float, the written-out formula while quantizing."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat import Operand, Phase, Plan, QuantSpec, set_phase
from qat.convert import HANDLERS, Handler, Maker, quant_pair
from qat.plan import Rule
from qat.products import Pair
from qat.quantizers import Affine, quantizers
from qat.trace import trace

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


def _twin(
    module: nn.Module, rule: Rule = RULE, x: Tensor | None = None, **options: Any
) -> nn.Module:
    """A copy of a module, its products converted."""
    twin: Any = copy.deepcopy(module)
    x = torch.zeros(1, TOKENS, DIM) if x is None else x
    twin.example_inputs = lambda device: (x[:1].to(device),)
    qat.convert_(twin, Plan((rule,)), Affine, **options)
    return twin


def _calibrated(twin: nn.Module, *inputs: Tensor | None) -> nn.Module:
    with qat.observing(twin):
        twin(*inputs)
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


@FUSED
def test_window_attention_scales_its_queries_before_they_are_quantized_unless_fused(
    fused: bool,
) -> None:
    attention, x, mask = _window_attention(fused), torch.randn(4, TOKENS, DIM), _window_mask()
    twin = _calibrated(_twin(attention), x, mask)
    q, k, v = _split(attention, x)
    qk, av, scale = twin.qk, twin.av, (DIM // HEADS) ** -0.5
    shifted = mask[[0, 1, 0, 1]].unsqueeze(1)  # windows of image 0, then of image 1
    bias = attention._get_rel_pos_bias()
    if fused:
        logits = qk.left_quantizer(q) @ qk.right_quantizer(k).mT * scale + (bias + shifted)
    else:
        logits = qk.left_quantizer(q * scale) @ qk.right_quantizer(k).mT + bias + shifted
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


class PlusQueries(nn.Module):
    """A context module that can be seen."""

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.shape == k.shape == v.shape == x.shape
        return x + q


def with_queries(pair: Pair, make: Maker) -> tuple[nn.Module, ...]:
    return (*quant_pair(pair, make), PlusQueries())


@FUSED
def test_context_module_acts_while_quantizing_only(fused: bool) -> None:
    attention, x = _attention(fused), torch.randn(2, TOKENS, DIM)
    rule = Rule("*", attention=SPEC)
    handlers = {**HANDLERS, Pair: Handler(with_queries, HANDLERS[Pair].operands)}
    twin = _twin(attention, rule, handlers=handlers)
    plain = _calibrated(_twin(attention, rule), x)
    assert torch.equal(twin(x), attention(x))
    set_phase(twin, Phase.OBSERVE)
    torch.testing.assert_close(twin(x), attention(x))
    twin = _calibrated(twin, x)
    queries = _split(attention, x)[0] * (1 if fused else attention.scale)
    queries = queries.transpose(1, 2).flatten(2) @ attention.proj.weight.T
    torch.testing.assert_close(twin(x), plain(x) + queries)


class Attends(nn.Module):
    """Calls the fused function with any of its arguments."""

    def __init__(self, key_heads: int = HEADS, **arguments: Any) -> None:
        super().__init__()
        self.arguments, self.key_heads = arguments, key_heads

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k = q[:, : self.key_heads]
        return F.scaled_dot_product_attention(q, k, k * 2, **self.arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(2)},
        {"attn_mask": torch.linspace(-1, 1, TOKENS).expand(TOKENS, -1)},
        {"key_heads": 1, "enable_gqa": True},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_every_argument_of_fused_attention_is_honoured(arguments: dict[str, Any]) -> None:
    module, x = Attends(**arguments), torch.randn(2, TOKENS, DIM)
    twin = _twin(module, Rule("*", **dict.fromkeys(("query", "key"), QuantSpec(16))))
    assert torch.equal(twin(x), module(x))
    twin = _calibrated(twin, x)
    assert not torch.equal(twin(x), module(x))
    torch.testing.assert_close(twin(x), module(x), rtol=1e-3, atol=1e-3)


class Einsums(nn.Module):
    """Two attentions and a product, each by another function."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (HEADS, -1))
        weights = torch.einsum("bnhd,bmhd->bhnm", heads, heads).softmax(-1)
        first = torch.einsum("bhnm,bmhd->bnhd", weights, heads).flatten(2)
        bias = torch.zeros(1, 1, 1)
        weights = torch.baddbmm(bias, first, first.mT, alpha=0.1).softmax(-1)
        second = torch.bmm(weights, first)
        return x @ (second.transpose(1, 2) @ second)


def test_several_attentions_and_products_of_one_module_have_names_and_formulas_of_their_own() -> (
    None
):
    module, x = Einsums(), torch.randn(2, TOKENS, DIM)
    specs = {operand.value: SPEC for operand in Operand if operand.value not in ("weight", "input")}
    twin: Any = _twin(module, Rule("*", **specs), x)
    assert [name for name, _ in twin.named_children()] == [
        "qk", "av", "qk_1", "av_1", "product_2", "product_3"
    ]  # fmt: skip
    assert set(twin.card.conversion.kept) == set()
    assert torch.equal(twin(x), module(x))
    twin = _calibrated(twin, x)
    heads = x.unflatten(-1, (HEADS, -1))
    q, k = twin.qk.left_quantizer(heads), twin.qk.right_quantizer(heads)
    weights = twin.av.left_quantizer(torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1))
    first = torch.einsum("bhnm,bmhd->bnhd", weights, twin.av.right_quantizer(heads)).flatten(2)
    q, k = twin.qk_1.left_quantizer(first), twin.qk_1.right_quantizer(first)
    logits = torch.baddbmm(torch.zeros(1, 1, 1), q, k.mT, alpha=0.1)
    second = twin.av_1.left_quantizer(logits.softmax(-1)) @ twin.av_1.right_quantizer(first)
    inner = twin.product_2.left_quantizer(second.mT) @ twin.product_2.right_quantizer(second)
    expected = twin.product_3.left_quantizer(x) @ twin.product_3.right_quantizer(inner)
    assert torch.equal(twin(x), expected)


def test_rule_for_a_further_product_is_named_by_its_number() -> None:
    x = torch.randn(1, TOKENS, DIM)
    model: Any = nn.Sequential(Einsums())
    model.example_inputs = lambda device: (x.to(device),)
    rules = Rule("0#1", query=QuantSpec(3)), Rule("0", query=SPEC), Rule("0#*", reason="stay")
    qat.convert_(model, Plan(rules), Affine)
    assert {name: q.spec.bits for name, q in quantizers(model)} == {
        "0.qk.left_quantizer": 4,
        "0.qk_1.left_quantizer": 3,
    }
    assert model.card.conversion.kept == {"0#2": "stay", "0#3": "stay"}


class Passing(nn.Module):
    """Uses a layer's weight without calling the layer, as BEiT does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, DIM)
        self.bias = nn.Parameter(torch.randn(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, bias=self.bias)


def test_layer_whose_weight_is_used_without_calling_it_is_quantized_all_the_same() -> None:
    module, x = Passing(), torch.randn(2, TOKENS, DIM)
    twin: Any = _twin(module, Rule("qkv", weight=SPEC, input=SPEC))
    assert torch.equal(twin(x), module(x))
    twin = _calibrated(twin, x)
    weight, operand = twin.qkv.weight_quantizer(twin.qkv.weight), twin.qkv.input_quantizer(x)
    assert torch.equal(twin(x), F.linear(operand, weight, module.bias))


class Around(nn.Module):
    """A product around a module that has one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attends()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x).transpose(1, 2).flatten(2)
        return x.mT @ inner


@pytest.mark.parametrize("plan", ["both", "outer"])
def test_product_around_a_module_with_products_does_not_see_those(plan: str) -> None:
    module, x = Around(), torch.randn(2, TOKENS, DIM)
    attention = {"query": SPEC, "key": SPEC} if plan == "both" else {}
    twin: Any = _twin(module, Rule("*", left=SPEC, right=SPEC, **attention))
    assert torch.equal(twin(x), module(x))
    twin = _calibrated(twin, x)
    inner = twin.inner(x).transpose(1, 2).flatten(2)
    expected = twin.product.left_quantizer(x.mT) @ twin.product.right_quantizer(inner)
    assert torch.equal(twin(x), expected)
    assert torch.equal(twin.inner(x), module.inner(x)) == (plan == "outer")


def test_more_products_than_the_trace_found_are_refused() -> None:
    class Grows(nn.Module):
        twice = False

        def forward(self, x: Tensor) -> Tensor:
            return x @ (x.mT @ x) if self.twice else x.mT @ x

    module, x = Grows(), torch.randn(2, TOKENS, DIM)
    twin: Any = _twin(module, Rule("*", left=SPEC))
    twin.twice = True
    with pytest.raises(RuntimeError, match="runs more products than the 1 that the trace"):
        twin(x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_intercepted_module_can_be_copied_and_pickled(copied: Callable[[Any], Any]) -> None:
    x = torch.randn(2, TOKENS, DIM)
    twin: Any = _calibrated(_twin(_attention(True)), x)
    del twin.example_inputs
    again = copied(twin)
    assert torch.equal(again(x), twin(x)) and isinstance(again, Attention)
    again.qk.left_quantizer.scale.mul_(2)
    assert not torch.equal(again(x), twin(x))


def test_intercepted_module_keeps_its_class_and_the_names_of_its_state() -> None:
    attention = _window_attention(True)
    twin = _twin(attention)
    assert isinstance(twin, WindowAttention)
    added = set(twin.state_dict()) - set(attention.state_dict())
    assert {name.split(".")[0] for name in added} == {"qk", "av"}
    assert set(attention.state_dict()) <= set(twin.state_dict())


def test_trace_of_a_converted_model_is_that_of_the_float_one() -> None:
    module, x = Around(), torch.randn(1, TOKENS, DIM)
    twin = _calibrated(_twin(module, Rule("*", left=SPEC, right=SPEC, query=SPEC)), x)
    assert trace(twin, (x,)).calls == trace(module, (x,)).calls


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

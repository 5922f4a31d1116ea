"""The module-swap pass: puts quantizers around the operands that a plan names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from timm.layers.attention import Attention
from timm.models.swin_transformer import WindowAttention
from torch import nn

from qat.attention import QuantAttention, QuantWindowAttention
from qat.layers import QuantConv2d, QuantLinear, QuantMatmul
from qat.plan import Plan, Rule
from qat.quantizers import Quantizer, QuantizerFactory, quantizers
from qat.spec import Operand


@dataclass(frozen=True)
class Maker:
    """Builds the quantizers of one module by its rule; what a handler is given.

    Attributes:
        rule: The rule that applies to the module.
        make_quantizer: The factory `convert_` was given.
    """

    rule: Rule
    make_quantizer: QuantizerFactory

    def __call__(self, operand: Operand, shape: tuple[int, ...]) -> Quantizer | None:
        """The quantizer of an operand, None where the rule keeps it in float."""
        spec = self.rule.spec(operand)
        return None if spec is None else self.make_quantizer(spec, shape, operand)


@dataclass(frozen=True)
class Handler:
    """How one module type is converted.

    Attributes:
        build: Takes the float module and a `Maker`, returns its quantized twin.
        operands: The operands this module type has.
    """

    build: Callable[..., nn.Module]
    operands: tuple[str, ...]


def quant_linear(linear: nn.Linear, make: Maker) -> QuantLinear:
    """Twin of a linear layer."""
    weight = make(Operand.WEIGHT, tuple(linear.weight.shape))
    return QuantLinear(linear, weight, make(Operand.INPUT, (linear.in_features,)))


def quant_conv2d(conv: nn.Conv2d, make: Maker) -> QuantConv2d:
    """Twin of a convolution."""
    weight = make(Operand.WEIGHT, tuple(conv.weight.shape))
    return QuantConv2d(conv, weight, make(Operand.INPUT, (conv.in_channels, 1, 1)))


def quant_products(heads: int, head_dim: int, make: Maker) -> tuple[QuantMatmul, QuantMatmul]:
    """The products Q K^T and A V of an attention module."""
    vectors = (heads, 1, head_dim)
    query, key = make(Operand.QUERY, vectors), make(Operand.KEY, vectors)
    attention, value = make(Operand.ATTENTION, (heads, 1, 1)), make(Operand.VALUE, vectors)
    return QuantMatmul(query, key, transpose_right=True), QuantMatmul(attention, value)


def quant_attention(attention: Attention, make: Maker) -> QuantAttention:
    """Twin of timm's attention (ViT, DeiT)."""
    return QuantAttention(attention, *quant_products(attention.num_heads, attention.head_dim, make))


def quant_window_attention(attention: WindowAttention, make: Maker) -> QuantWindowAttention:
    """Twin of timm's window attention (Swin)."""
    heads = attention.num_heads
    head_dim = attention.qkv.out_features // (3 * heads)
    return QuantWindowAttention(attention, *quant_products(heads, head_dim, make))


LAYER_OPERANDS = ("weight", "input")
ATTENTION_OPERANDS = ("query", "key", "attention", "value")

HANDLERS: Mapping[type[nn.Module], Handler] = {
    nn.Linear: Handler(quant_linear, LAYER_OPERANDS),
    nn.Conv2d: Handler(quant_conv2d, LAYER_OPERANDS),
    Attention: Handler(quant_attention, ATTENTION_OPERANDS),
    WindowAttention: Handler(quant_window_attention, ATTENTION_OPERANDS),
}


@dataclass(frozen=True)
class Conversion:
    """What `convert_` did, enough to do it again; kept on the model as `model.conversion`.

    Attributes:
        plan: The plan.
        make_quantizer: The factory.
        handlers: Module type to handler.
        kept: For each quantizable module left in float, by name, the reason.
    """

    plan: Plan
    make_quantizer: QuantizerFactory
    handlers: Mapping[type[nn.Module], Handler]
    kept: Mapping[str, str]


def convert_(
    model: nn.Module,
    plan: Plan,
    make_quantizer: QuantizerFactory,
    handlers: Mapping[type[nn.Module], Handler] = HANDLERS,
) -> Conversion:
    """Replace, in place, the modules that the plan names by twins with quantizers.

    All quantizers start in phase FLOAT, in which the model computes exactly what it did before.
    If anything is wrong the model is left untouched.

    Args:
        model: A timm model, or any model made of module types in `handlers`.
        plan: Name patterns and specs.
        make_quantizer: Builds the quantizer of each operand.
        handlers: Module type to handler.

    Returns:
        What was done; also kept as `model.conversion`.

    Raises:
        ValueError: If the model is converted already, a rule has no effect, a rule applies to a
            module type without handler, or the factory offers no quantizer for a spec.
    """
    if any(True for _ in quantizers(model)):
        raise ValueError(
            "the model is converted already; convert the float model once, with one plan whose "
            "rules say everything"
        )
    applied: dict[str, frozenset[Operand]] = {}
    twins: dict[str, nn.Module] = {}
    kept: dict[str, str] = {}
    seen: dict[nn.Module, nn.Module] = {}  # a module under two names keeps one twin
    for name, module in model.named_modules(remove_duplicate=False):
        rule = plan.match(name)
        handler = handlers.get(type(module))
        if handler is None:
            if rule is not None:
                _refuse_unknown(name, module, rule, handlers)
            continue
        operands = frozenset(Operand(word) for word in handler.operands)
        applied[name] = operands
        if rule is not None and (not operands or rule.operands & operands):
            if module not in seen:
                seen[module] = _build(name, module, handler, Maker(rule, make_quantizer))
            twins[name] = seen[module]
        elif rule is None:
            kept[name] = "no rule of the plan matches it"
        else:
            kept[name] = rule.reason or f"rule '{rule.pattern}' gives it no spec"
    plan.check_applied(applied)
    for name, twin in twins.items():
        model.set_submodule(name, twin)
    conversion = Conversion(plan, make_quantizer, handlers, kept)
    model.conversion = conversion  # type: ignore[assignment]
    return conversion


def _build(name: str, module: nn.Module, handler: Handler, make: Maker) -> nn.Module:
    try:
        twin = handler.build(module, make)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    kept = set(module.modules())
    for part in twin.modules():
        if part not in kept:
            part.training = module.training
    return twin


def _refuse_unknown(
    name: str, module: nn.Module, rule: Rule, handlers: Mapping[type[nn.Module], Handler]
) -> None:
    """Refuse a module whose products a rule names but no handler can reach."""
    derived = [known for known in handlers if isinstance(module, known)]
    asks_attention = rule.operands & {Operand(word) for word in ATTENTION_OPERANDS}
    hides_products = hasattr(module, "fused_attn") or isinstance(module, nn.MultiheadAttention)
    if (derived and rule.operands) or (asks_attention and hides_products):
        names = ", ".join(sorted(known.__name__ for known in handlers))
        raise ValueError(
            f"{name}: plan rule '{rule.pattern}' applies to a {type(module).__name__}, for which "
            f"there is no handler (there are: {names}); exclude it by an earlier rule without "
            "specs, or pass `handlers` with an entry for its type"
        )

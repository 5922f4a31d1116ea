"""The module-swap pass: puts quantizers around the operands that a plan names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qat.card import Conversion, amend
from qat.layers import QuantConv2d, QuantLinear, QuantMatmul, quant_layer
from qat.models import example_inputs, has_example
from qat.multihead import QuantMultiheadAttention
from qat.plan import Plan, Rule
from qat.products import Group, Pair, Product, Site, groups, intercept_
from qat.quantizers import Quantizer, QuantizerFactory, quantizers
from qat.spec import Operand
from qat.trace import ATTENTIONS, Trace, trace


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
    """How one type of module, or the products of one form, is converted.

    Attributes:
        build: Takes the float module and a `Maker`, returns its quantized twin; or a `Pair` or
            `Product`, and returns the modules that multiply, for a pair perhaps a third one that
            is given the result and query, key and value.
        operands: The operands it has.
    """

    build: Callable[..., Any]
    operands: tuple[str, ...]


def quant_linear(linear: nn.Linear, make: Maker) -> nn.Module:
    """Twin of a linear layer."""
    weight = make(Operand.WEIGHT, tuple(linear.weight.shape))
    operands = weight, make(Operand.INPUT, (linear.in_features,))
    plain = type(linear).forward is nn.Linear.forward
    return QuantLinear(linear, *operands) if plain else quant_layer(linear, *operands)


def quant_conv(conv: nn.Conv1d | nn.Conv2d, make: Maker) -> nn.Module:
    """Twin of a convolution."""
    ones = (1,) * (conv.weight.ndim - 2)
    weight = make(Operand.WEIGHT, tuple(conv.weight.shape))
    operands = weight, make(Operand.INPUT, (conv.in_channels, *ones))
    own = type(conv).forward, type(conv)._conv_forward
    plain = own == (nn.Conv2d.forward, nn.Conv2d._conv_forward) and conv.padding_mode == "zeros"
    return QuantConv2d(conv, *operands) if plain else quant_layer(conv, *operands)  # type: ignore[arg-type]


def quant_pair(pair: Pair, make: Maker) -> tuple[nn.Module, ...]:
    """The products Q K^T and A V of an attention."""
    query, key = make(Operand.QUERY, pair.vectors), make(Operand.KEY, pair.vectors)
    attention = make(Operand.ATTENTION, pair.attention)
    value = make(Operand.VALUE, pair.vectors)
    return QuantMatmul(query, key, transpose_right=True), QuantMatmul(attention, value)


def quant_product(product: Product, make: Maker) -> tuple[nn.Module, ...]:
    """A product of two activations outside of an attention."""
    left, right = make(Operand.LEFT, product.left), make(Operand.RIGHT, product.right)
    return (QuantMatmul(left, right),)


def quant_multihead(attention: nn.MultiheadAttention, make: Maker) -> QuantMultiheadAttention:
    """Twin of torch's attention with a packed projection."""
    heads, dim = attention.num_heads, attention.embed_dim
    weight = make(Operand.WEIGHT, (3 * dim, dim))
    products = quant_pair(Pair((heads, 1, dim // heads), (heads, 1, 1)), make)
    return QuantMultiheadAttention(attention, weight, make(Operand.INPUT, (dim,)), *products)  # type: ignore[arg-type]


LAYER_OPERANDS = ("weight", "input")
ATTENTION_OPERANDS = ("query", "key", "attention", "value")
PRODUCT_OPERANDS = ("left", "right")

HANDLERS: Mapping[type, Handler] = {
    nn.Linear: Handler(quant_linear, LAYER_OPERANDS),
    nn.Conv1d: Handler(quant_conv, LAYER_OPERANDS),
    nn.Conv2d: Handler(quant_conv, LAYER_OPERANDS),
    nn.MultiheadAttention: Handler(quant_multihead, LAYER_OPERANDS + ATTENTION_OPERANDS),
    Pair: Handler(quant_pair, ATTENTION_OPERANDS),
    Product: Handler(quant_product, PRODUCT_OPERANDS),
}


def convert_(
    model: nn.Module,
    plan: Plan,
    make_quantizer: QuantizerFactory,
    handlers: Mapping[type, Handler] = HANDLERS,
) -> Conversion:
    """Put quantizers, in place, around the operands that the plan names.

    Layers are replaced by twins; a module that runs products itself, such as an attention, keeps
    its forward pass, which is intercepted (`qat.products`). All quantizers start in phase FLOAT, in
    which the model computes exactly what it did before. If anything is wrong the model is left
    untouched.

    Args:
        model: The model. Products are found by a trace, which needs to know what the model's input
            looks like; without that only layers are converted.
        plan: Name patterns and specs.
        make_quantizer: Builds the quantizer of each operand.
        handlers: Type to handler, of modules and of `Pair` and `Product`.

    Returns:
        What was done; also kept in the model's card.

    Raises:
        ValueError: If the model is converted already, a rule has no effect, or the factory offers
            no quantizer for a spec.
    """
    if any(True for _ in quantizers(model)):
        raise ValueError(
            "the model is converted already; convert the float model once, with one plan whose "
            "rules say everything"
        )
    found = trace(model, example_inputs(model)) if has_example(model) else Trace()
    work = _Work(plan, make_quantizer, handlers)
    twins = work.layers(model)
    owners = {name: work.products(model, name, found) for name in found.owners()}
    plan.check_applied(work.applied)
    for name, twin in twins.items():
        model.set_submodule(name, twin)
    bypassed = _bypassed(found, twins)
    for name in dict.fromkeys((*owners, *bypassed)):
        sites, children = owners.get(name, ((), {}))
        if any(sites) or name in bypassed or _is_within(name, owners):
            intercept_(model.get_submodule(name), sites, children, bypassed.get(name, ()))
    conversion = Conversion(plan, make_quantizer, handlers, work.kept)
    amend(model, conversion=conversion)
    return conversion


class _Work:
    """What is converted and what is kept, as it is found out."""

    def __init__(
        self, plan: Plan, make_quantizer: QuantizerFactory, handlers: Mapping[type, Handler]
    ) -> None:
        self.plan, self.make_quantizer, self.handlers = plan, make_quantizer, handlers
        self.applied: dict[str, frozenset[Operand]] = {}
        self.kept: dict[str, str] = {}

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Twins of the layers that the plan quantizes, by name."""
        twins: dict[str, nn.Module] = {}
        seen: dict[nn.Module, nn.Module] = {}  # a module under two names keeps one twin
        for name, module in model.named_modules(remove_duplicate=False):
            kinds = (kind for kind in type(module).__mro__ if kind in self.handlers)
            handler = self.handlers.get(next(kinds, type(module)))
            if handler is not None and (maker := self._maker(name, handler)):
                if module not in seen:
                    seen[module] = _build(name, module, handler, maker, module.training)
                twins[name] = seen[module]
        return twins

    def products(
        self, model: nn.Module, owner: str, found: Trace
    ) -> tuple[tuple[Site | None, ...], dict[str, nn.Module]]:
        """Where the calls of a module go, and what multiplies there."""
        calls = found.owners()[owner]
        module = model.get_submodule(owner)
        sites: list[Site | None] = [None] * len(calls)
        children: dict[str, nn.Module] = {}
        for group in groups(owner, calls):
            handler = self.handlers.get(type(group.form))
            if handler is None or not (maker := self._maker(group.name, handler)):
                continue
            built = _build(group.name, group.form, handler, maker, module.training)
            names = _names(module, group, len(built))
            children |= dict(zip(names, built, strict=True))
            one = calls[group.calls[0]].function in ATTENTIONS
            kinds = ("attention",) if one else ("first", "second")
            kinds = kinds if len(group.children) > 1 else ("product",)
            for number, kind in zip(group.calls, kinds, strict=True):
                sites[number] = Site(kind, *names)
        return tuple(sites), children

    def _maker(self, name: str, handler: Handler) -> Maker | None:
        """What builds the quantizers of a module or product; None where it is kept in float."""
        rule = self.plan.match(name)
        operands = frozenset(Operand(word) for word in handler.operands)
        self.applied[name] = self.applied.get(name, frozenset()) | operands
        if rule is not None and (not operands or rule.operands & operands):
            return Maker(rule, self.make_quantizer)
        stated = rule and (rule.reason or f"rule '{rule.pattern}' gives it no spec")
        self.kept[name] = stated or "no rule of the plan matches it"
        return None


def _build(name: str, subject: Any, handler: Handler, make: Maker, training: bool) -> Any:
    try:
        built = handler.build(subject, make)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    kept = set(subject.modules()) if isinstance(subject, nn.Module) else set()
    for top in (built,) if isinstance(built, nn.Module) else built:
        for part in top.modules():
            if part not in kept:
                part.training = training
    return built


def _names(module: nn.Module, group: Group, count: int) -> tuple[str, ...]:
    """Names of what is built for a group; another one where the module has such an attribute."""
    names = (*group.children, group.children[0].replace("qk", "context"))[:count]
    return tuple(f"quant_{name}" if hasattr(module, name) else name for name in names)


def _bypassed(found: Trace, twins: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """For each module that uses the weight of a converted layer within it, the layers' paths."""
    paths: dict[str, list[str]] = {}
    for call in found.calls:
        if call.layer is not None and call.layer in twins and call.layer != call.owner:
            prefix = f"{call.owner}." if call.owner else ""
            if call.layer.startswith(prefix):
                paths.setdefault(call.owner, []).append(call.layer.removeprefix(prefix))
    return {owner: tuple(dict.fromkeys(found)) for owner, found in paths.items()}


def _is_within(name: str, owners: Mapping[str, tuple[tuple[Site | None, ...], Any]]) -> bool:
    """Whether a module lies within one that is intercepted, which is not to see its products."""
    return any(
        name != other and name.startswith(f"{other}." if other else "")
        for other, (sites, _) in owners.items()
        if any(sites)
    )

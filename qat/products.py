"""The one seam for products without a weight: attention of any family.

A module that runs products itself keeps its class, its forward pass and its parameters. A subclass
made for it adds quantized products as children, and a torch function mode around its forward pass
sends `matmul`, `bmm`, `baddbmm`, `einsum` and `scaled_dot_product_attention` to them, in the order
that a trace (`qat.trace`) has found. In phase FLOAT the very functions are called that the model
calls.

    attention   logits = Q(q) Q(k)^T * scale + mask,   output = Q(softmax(logits)) Q(v)
    others      Q(left) Q(right)

Q is the quantizer of an operand. The query and the key are seen unscaled where a function scales
them; where the module scales the query itself, its quantizer sees what is multiplied.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qat.attention import attend
from qat.intercept import Intercepted, intercepted
from qat.layers import QuantMatmul
from qat.quantizers import Phase
from qat.trace import ATTENTIONS, EINSUMS, LINEARS, REACHABLE, SUMS, Call

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """The two products of an attention, as a handler of `qat.convert` is asked to build them.

    Attributes:
        vectors: Trailing shape of query, key and value: (heads, 1, head_dim).
        attention: Trailing shape of the attention map: (heads, 1, 1).
    """

    vectors: Shape
    attention: Shape


@dataclass(frozen=True)
class Product:
    """A product outside of an attention, likewise.

    Attributes:
        left: Trailing shape of the left operand.
        right: Trailing shape of the right operand.
    """

    left: Shape
    right: Shape


@dataclass(frozen=True)
class Site:
    """Where a call of a module is sent.

    Attributes:
        kind: Both products of an attention in one call, its first or its second, or a product.
        first: Name of the child that multiplies: `qk` of an attention.
        second: Name of the child of the second product of an attention.
        context: Name of the child that sees what an attention gives, and its operands.
    """

    kind: str
    first: str
    second: str = ""
    context: str = ""

    @property
    def children(self) -> tuple[str, ...]:
        """Names of the children that multiply in this call."""
        match self.kind:
            case "attention":
                return self.first, self.second
            case "second":
                return (self.second,)
            case _:
                return (self.first,)


@dataclass(frozen=True)
class Group:
    """Calls that belong together: an attention, or a single product.

    Attributes:
        name: Plan name: that of the module, and `#1`, `#2` ... for what is not its first group.
        calls: Numbers of the calls among those of the module.
        form: What a handler has to build.
        children: Names of the children that multiply.
    """

    name: str
    calls: tuple[int, ...]
    form: Pair | Product
    children: tuple[str, ...]


def groups(owner: str, calls: list[Call]) -> list[Group]:
    """The groups of a module's calls, in the order of their first one.

    Args:
        owner: Name of the module.
        calls: Its calls to reachable functions, in order.
    """
    second = {call.follows: i for i, call in enumerate(calls) if call.follows is not None}
    taken = set(second.values())
    found: list[Group] = []
    for i, call in enumerate(calls):
        if i in taken or not (call.macs or i in second):
            continue
        count = len(found)
        name, suffix = (f"{owner}#{count}", f"_{count}") if count else (owner, "")
        if call.function in ATTENTIONS or i in second:
            vectors = _trailing(call.shapes[0])
            form = Pair(vectors, (*vectors[:-2], 1, 1))
            numbers = (i,) if call.function in ATTENTIONS else (i, second[i])
            found.append(Group(name, numbers, form, (f"qk{suffix}", f"av{suffix}")))
        else:
            left, right = call.shapes[-2:]
            form = Product(_trailing(left), _trailing(right))
            found.append(Group(name, (i,), form, (f"product{suffix}",)))
    return found


def _trailing(shape: Shape) -> Shape:
    """Trailing shape of an operand: without the batch, and 1 for its rows."""
    return (*shape[1:-2], 1, shape[-1])


class QuantProducts(Intercepted):
    """A module whose products pass through quantizers.

    Attributes:
        qat_sites: Where each call goes, by its number; None leaves it as it is.
        qat_bypassed: Paths of layers that the module does not call, but whose weight it uses.
    """

    qat_sites: tuple[Site | None, ...]
    qat_bypassed: tuple[str, ...]

    def qat_calls(self) -> TorchFunctionMode:
        """Sends products to the quantizers."""
        return _Calls(self)


def intercept_(
    module: nn.Module,
    sites: tuple[Site | None, ...],
    children: Mapping[str, nn.Module],
    bypassed: tuple[str, ...] = (),
) -> None:
    """Intercept the products of a module, in place.

    Args:
        module: The module.
        sites: Where each of its calls goes.
        children: What multiplies there, by name; becomes part of the module.
        bypassed: Paths of layers within it whose weight it uses itself.
    """
    for name, child in children.items():
        module.add_module(name, child)
    module.qat_sites, module.qat_bypassed = sites, bypassed  # type: ignore[assignment]
    module.__class__ = intercepted(QuantProducts, type(module))


class _Calls(TorchFunctionMode):
    """The calls of one forward pass of a module."""

    def __init__(self, owner: QuantProducts) -> None:
        super().__init__()
        self.owner = owner
        self.number = 0
        self.operands: dict[str, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():  # what lies around this module is not to see it
            if func in REACHABLE:
                site = self._next()
                if site is not None:
                    return self._sent(site, func, args, kwargs)
            elif func in LINEARS and self.owner.qat_bypassed:
                layer = self._layer(*args, **kwargs)
                if layer is not None:
                    return layer.with_bias(*_input_and_bias(*args, **kwargs))
            return func(*args, **kwargs)

    def _next(self) -> Site | None:
        number, self.number = self.number, self.number + 1
        if number >= len(self.owner.qat_sites):
            name, found = type(self.owner).__name__, len(self.owner.qat_sites)
            raise RuntimeError(
                f"{name} runs more products than the {found} "
                "that the trace of its forward pass has found; convert the model in the state and "
                "with the inputs that it is used with"
            )
        return self.owner.qat_sites[number]

    def _sent(self, site: Site, func: Any, args: Any, kwargs: Any) -> Any:
        owner = self.owner
        first: QuantMatmul = getattr(owner, site.first)
        second: QuantMatmul | None = getattr(owner, site.second) if site.second else None
        if first.phase is Phase.FLOAT and (second is None or second.phase is Phase.FLOAT):
            return func(*args, **kwargs)
        match site.kind:
            case "attention":
                assert second is not None
                return attend(first, second, self._context(site), *args, **kwargs)
            case "first":
                left, right, multiply = _operands(func, *args, **kwargs)
                transposed = right.mT if first.transpose_right else right
                self.operands[site.first] = left, transposed
                return first(left, transposed, multiply)
            case "second":
                assert second is not None
                left, value, multiply = _operands(func, *args, **kwargs)
                result = second(left, value, multiply)
                context = self._context(site)
                if context is not None and second.phase is Phase.QUANTIZE:
                    result = context(result, *self.operands[site.first], value)
                return result
            case _:
                return first(*_operands(func, *args, **kwargs))

    def _context(self, site: Site) -> nn.Module | None:
        return getattr(self.owner, site.context) if site.context else None

    def _layer(self, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Any:
        layers = (self.owner.get_submodule(path) for path in self.owner.qat_bypassed)
        return next((layer for layer in layers if layer.weight is weight), None)


def _operands(
    func: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """The operands of a product, and how the function multiplies them."""
    if func in EINSUMS:
        equation, *operands = args
        left, right = operands if len(operands) == 2 else operands[0]
        return left, right, lambda a, b: torch.einsum(equation, a, b)
    if func in SUMS:
        named = dict(zip(("input", "batch1", "batch2"), args, strict=False), **kwargs)
        left, right = named.pop("batch1"), named.pop("batch2")
        return left, right, lambda a, b: torch.baddbmm(batch1=a, batch2=b, **named)
    left, right = (*args, *kwargs.values())[:2]
    return left, right, torch.matmul


def _input_and_bias(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor | None]:
    return input, bias

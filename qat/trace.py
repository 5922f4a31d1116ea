"""A trace: every product that a model runs, which module runs it, on what, and what it costs.

The model runs once, for one image, on the meta device, so that nothing is computed. A product is an
operation that `torch.utils.flop_counter` counts, by its own formulas, so totals agree with it. Each
belongs to the innermost module that was running, and to the function that this module called.

A call that `qat.products` can send to quantizers is *reachable*. Where a softmax stands between
two products of a module, the second `follows` the first: an attention.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from qat.quantizers import Phase, set_phase

MULTIHEAD = F.multi_head_attention_forward
MATMULS = frozenset(
    {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm}
)
ATTENTIONS = frozenset({F.scaled_dot_product_attention})
SUMS = frozenset({torch.baddbmm, Tensor.baddbmm})
EINSUMS = frozenset({torch.einsum})
REACHABLE = MATMULS | ATTENTIONS | SUMS | EINSUMS
"""Functions whose operands `qat.products` can quantize."""
LINEARS = frozenset({F.linear, F.conv1d, F.conv2d})
"""Functions that take a layer's weight."""
MOVES = frozenset(
    (
        *("view", "reshape", "permute", "transpose", "flatten", "unflatten", "movedim"),
        *("squeeze", "unsqueeze", "expand", "contiguous", "clone", "roll", "pad", "chunk"),
        *("split", "unbind", "dropout", "to", "type", "float", "__get__"),
    )
)
"""Names of functions that let values change their places only; padding may add some."""
KERNELS = (nn.RNNBase, nn.Bilinear)
"""Modules whose products run in a kernel that shows none; torch's counter has none for them."""
SOFTMAXES = frozenset({F.softmax, torch.softmax, Tensor.softmax})


@dataclass(frozen=True)
class Call:
    """One function call that runs products.

    Attributes:
        owner: Name of the module that makes it.
        function: The function; None where products run within a function that is not seen.
        macs: Multiply-accumulates of each of its products.
        shapes: Shapes of its operands.
        number: Which of the owner's calls to reachable functions it is, within one forward pass of
            the owner.
        layer: Name of the layer whose weight it takes; that of the owner where this is the layer.
        follows: Number, among the calls of the owner, of the product whose softmax is the left
            operand of this one.
    """

    owner: str
    function: Callable[..., Any] | None
    macs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    number: int = 0
    layer: str | None = None
    follows: int | None = None


@dataclass
class Trace:
    """All calls of a forward pass, in order.

    Attributes:
        calls: The calls; those that a module makes itself come after those of its children.
        readers: For the output of each LayerNorm, by name, who reads it: names of layers, or None
            for whatever else computes with it.
        uncounted: Modules that run products which no one can count.
    """

    calls: list[Call] = field(default_factory=list)
    readers: dict[str, list[str | None]] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()

    def owners(self) -> dict[str, list[Call]]:
        """For each module that calls reachable functions, these calls within one forward pass."""
        found: dict[str, dict[int, Call]] = {}
        for call in self.calls:
            if call.function in REACHABLE and call.layer is None:
                found.setdefault(call.owner, {}).setdefault(call.number, call)
        return {owner: [calls[i] for i in sorted(calls)] for owner, calls in found.items()}


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution, or a twin of one."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    twin = hasattr(module, "weight_quantizer") and not isinstance(module, nn.MultiheadAttention)
    return isinstance(module, kinds) or twin


def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Trace:
    """Trace a model, in evaluation mode; it is not changed.

    A model that cannot run on the meta device, since it holds tensors beside its parameters and
    buffers or looks at their values, runs where it is.

    Args:
        model: The model.
        inputs: Inputs of one image.
    """
    floats = (x.dtype for x in model.parameters() if x.is_floating_point())
    dtype = next(floats, torch.float32)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    try:
        return _traced(on_meta(model), tuple(x.to("meta") for x in inputs))
    except (RuntimeError, NotImplementedError):
        device = next(chain(model.parameters(), model.buffers(), inputs)).device
        return _traced(copy.deepcopy(model), tuple(x.to(device) for x in inputs))


def _traced(traced: nn.Module, inputs: tuple[Tensor, ...]) -> Trace:
    set_phase(traced.eval(), Phase.FLOAT)
    for module in traced.modules():
        if hasattr(module, "bare_"):
            module.bare_()  # type: ignore[operator] - its products are to be seen
    found = Trace()
    recorder = _Recorder(traced, found)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), recorder.watching(), recorder:
        traced(*inputs)
    kernels = (name for name, module in traced.named_modules() if isinstance(module, KERNELS))
    found.uncounted = tuple(kernels)
    return found


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, made without copying a weight."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(x): _like(x) for x in tensors}
    return copy.deepcopy(model, memo)


def _like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


class _Counter(TorchDispatchMode):
    """Lists the multiply-accumulates of every operation that the FLOP counter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry and func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if packet in flop_registry:
            self.macs.append(flop_registry[packet](*args, **kwargs, out_val=result) // 2)
        return result


class _Recorder(TorchFunctionMode):
    """Sees every function call of a forward pass, and what flows from products to products."""

    def __init__(self, model: nn.Module, found: Trace) -> None:
        super().__init__()
        self.model, self.found = model, found
        self.counter = _Counter()
        self.running: list[tuple[str, nn.Module]] = [("", model)]
        self.numbers: dict[str, int] = {}
        self.pending: dict[str, list[Call]] = {}
        # What a tensor comes from, by identity; the tensors are kept, so that identities stay.
        self.origins: dict[int, frozenset[Any]] = {}
        self.kept: list[Tensor] = []
        self.layers = {
            id(module.weight): name
            for name, module in model.named_modules()
            if is_layer(module) and isinstance(module.weight, Tensor)
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know which module is running."""
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                enter, leave = partial(self._enter, name), partial(self._leave, name)
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield

    def _enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        self.running.append((name, module))
        self.numbers[name] = 0

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self.running.pop()
        self.found.calls += self.pending.pop(name, [])
        if isinstance(module, nn.LayerNorm) and isinstance(output, Tensor):
            self.found.readers.setdefault(name, [])
            self._mark(output, frozenset({("norm", name)}))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        before = len(self.counter.macs)
        with self.counter:
            result = func(*args, **kwargs)
        hidden = isinstance(self.running[-1][1], KERNELS)
        macs = () if hidden else tuple(self.counter.macs[before:])
        made = list(_tensors(result))
        if not made:
            return result
        origins = frozenset[Any]().union(*(self.origins.get(id(x), frozenset()) for x in given))
        if macs or func in REACHABLE:
            origins = self._record(func, given, macs, origins)
        elif func in SOFTMAXES:
            origins = frozenset(("softmax", *o[1:]) if o[0] == "product" else o for o in origins)
        elif getattr(func, "__name__", "") not in MOVES:
            origins = self._read(None, origins)
        for tensor in made:
            self._mark(tensor, origins)
        return result

    def _record(
        self, func: Any, given: list[Tensor], macs: tuple[int, ...], origins: frozenset[Any]
    ) -> frozenset[Any]:
        """Note a call; what its result comes from."""
        owner, module = self.running[-1]
        layer = owner if is_layer(module) else self._layer_of(func, given)
        origins = self._read(layer if layer == owner else None, origins)
        number = self.numbers.get(owner, 0)
        follows = None
        if func in REACHABLE:
            self.numbers[owner] = number + 1
            left = self.origins.get(id(_left(func, given)), frozenset())
            earlier = [o[2] for o in left if o[0] == "softmax" and o[1] == owner]
            follows = max(earlier) if earlier else None
        shapes = tuple(tuple(x.shape) for x in given)
        call = Call(owner, func, macs, shapes, number, layer, follows)
        self.pending.setdefault(owner, []).append(call)
        if layer is not None:  # what is computed linearly from logits still is logits
            return origins
        return frozenset({("product", owner, number)})

    def _read(self, reader: str | None, origins: frozenset[Any]) -> frozenset[Any]:
        """Note who reads the outputs of norms; what comes from them no longer does."""
        for origin in origins:
            if origin[0] == "norm":
                self.found.readers[origin[1]].append(reader)
        return frozenset(origin for origin in origins if origin[0] != "norm")

    def _layer_of(self, func: Any, given: list[Tensor]) -> str | None:
        """The layer that a function takes the weight of, without calling it."""
        if func not in LINEARS or len(given) < 2:
            return None
        return self.layers.get(id(given[1]))

    def _mark(self, tensor: Tensor, origins: frozenset[Any]) -> None:
        self.kept.append(tensor)
        self.origins[id(tensor)] = origins


def _left(func: Any, given: list[Tensor]) -> Tensor:
    """The left operand of a product; before it a sum has what is added."""
    return given[1] if func in SUMS and len(given) > 2 else given[0]


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))

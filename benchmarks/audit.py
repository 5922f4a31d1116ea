"""Multiply-accumulates below 16 bits, counted by following tensors out of quantizers.

A second opinion on `qat.cost`, with which it shares nothing but torch's formulas: it knows what a
quantizer is, and sees the operations of a real forward pass.

    tag     what a quantizer in phase QUANTIZE returns has its bits
    moved   views share the tag, copies that only move values keep it, all else drops it
    covered both operands of a product have tags below 16 bits
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from qat.quantizers import Phase, Quantizer

aten = torch.ops.aten

OPERANDS = {
    aten.mm: (0, 1),
    aten.bmm: (0, 1),
    aten.addmm: (1, 2),
    aten.baddbmm: (1, 2),
    aten.convolution: (0, 1),
    aten._convolution: (0, 1),
}
"""Products, and which of their arguments are the operands."""
MOVES = {
    *(aten.clone, aten._to_copy, aten._unsafe_view, aten._reshape_copy, aten.repeat),
    *(aten.cat, aten.stack, aten.index, aten.index_select, aten.gather, aten.roll, aten.flip),
    *(aten.constant_pad_nd, aten.reflection_pad1d, aten.reflection_pad2d),
    *(aten.replication_pad1d, aten.replication_pad2d, aten.im2col),
    *(aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle),
}
"""Operations with a storage of their own whose values are those of their first argument."""


@dataclass(frozen=True)
class Product:
    """One operation that multiplies.

    Attributes:
        owner: Name of the module that was running.
        operation: Name of the operation.
        macs: Its multiply-accumulates.
        bits: Widths of its operands; 32 where there is no tag.
    """

    owner: str
    operation: str
    macs: int
    bits: tuple[float, float]

    @property
    def covered(self) -> bool:
        """Whether both operands have fewer than 16 bits."""
        return max(self.bits) < 16


def audit(model: nn.Module, *inputs: Tensor) -> list[Product]:
    """Every product of a forward pass in evaluation mode.

    Args:
        model: The model, whose quantizers are in the phase that is to be looked at.
        inputs: What it is called with.
    """
    mode = model.training
    follower = _Follower()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), follower.hooked(model.eval()), follower:
        model(*inputs)
    model.train(mode)
    return follower.products


def coverage(products: list[Product]) -> float:
    """Share of the multiply-accumulates that are covered."""
    return sum(p.macs for p in products if p.covered) / sum(p.macs for p in products)


class _Follower(TorchDispatchMode):
    """Carries tags from operation to operation."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []
        self.running: list[str] = []
        # By address of the storage; the storages are kept, so that no address comes twice.
        self.tags: dict[int, tuple[torch.UntypedStorage, float]] = {}

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """Know which module runs, and see what quantizers return."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                stack.callback(module.register_forward_pre_hook(self._enter(name)).remove)
                stack.callback(module.register_forward_hook(self._leave).remove)
            yield

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda module, inputs: self.running.append(name)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.running.pop()
        if isinstance(module, Quantizer) and module.phase is Phase.QUANTIZE:
            self._tag(output, module.spec.bits)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        result = func(*args, **kwargs)
        if packet in flop_registry:
            macs = flop_registry[packet](*args, **kwargs, out_val=result) // 2
            left, right = tuple(self._bits(args[i]) for i in OPERANDS.get(packet, ())) or (32, 32)
            owner = self.running[-1] if self.running else ""
            self.products.append(Product(owner, packet.__name__, macs, (left, right)))
        if packet in MOVES:
            sources = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            bits = max(map(self._bits, sources))
            if bits < 32:
                self._tag(result, bits)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(value, Tensor):
                self.tags.pop(value.untyped_storage()._cdata, None)
        return result

    def _tag(self, tensor: Tensor, bits: float) -> None:
        storage = tensor.untyped_storage()
        self.tags[storage._cdata] = storage, bits

    def _bits(self, tensor: Tensor) -> float:
        return self.tags.get(tensor.untyped_storage()._cdata, (None, 32))[1]

"""Whole transformer blocks, each in one call."""

import ctypes
from collections.abc import Iterable

import numpy as np

from qat.kernels import binary_block, plain_block
from qat.kernels.arrays import Array, Floats, address, floats
from qat.kernels.binary_block import BinaryBlock, LayerArguments
from qat.kernels.native import Native
from qat.kernels.plain_block import PlainBlock
from qat.kernels.products import Products, require_attention, require_words

PreparedBlock = tuple[ctypes.Structure, int, list[Array | None]]
"""Arguments of a block, its width, and the arrays that the arguments point to."""


class Blocks:
    """Transformer blocks, by the kernels of an instruction set.

    Args:
        native: The kernels.
    """

    def __init__(self, native: Native) -> None:
        self._run, self._products = native.run, Products(native)

    def prepare_plain_block(self, block: PlainBlock) -> PreparedBlock:
        """A block of bits between its two sums, for `plain_block`."""
        require_attention(block.head_dim, block.logit_scale)
        require_words(block.head_dim)
        arrays: list[Array | None] = list(block.arrays(self._bits))
        sizes = block.heads, block.head_dim, block.hidden
        scales = block.eps, block.logit_scale, block.map_scale
        made = plain_block.Arguments(*_addresses(arrays), *sizes, *scales)
        return made, block.width, arrays

    def prepare_binary_block(self, block: BinaryBlock) -> PreparedBlock:
        """Any binary block, for `binary_block`."""
        require_attention(block.head_dim, block.logit_scale)
        layers, arrays = [], list(block.arrays())
        outside = _addresses(arrays)
        for layer in block.layers:
            inside = list(layer.arrays(self._bits))
            layers.append(LayerArguments(*_addresses(inside), layer.inputs, layer.outputs))
            arrays += inside
        scales = block.eps, block.react_eps, block.logit_scale, block.map_scale
        made = binary_block.Arguments(*outside, *layers, block.heads, *scales)
        return made, block.width, arrays

    def plain_block(self, x: Floats, block: PreparedBlock, kept: int) -> Floats:
        """The first `kept` tokens that a block gives for x (batch, tokens, width), in x."""
        return self._in_place("plain_block", x, block, kept)

    def binary_block(self, x: Floats, block: PreparedBlock, kept: int) -> Floats:
        """The first `kept` tokens that a block gives for x (batch, tokens, width), in x."""
        return self._in_place("binary_block", x, block, kept)

    def _in_place(self, operation: str, x: Floats, block: PreparedBlock, kept: int) -> Floats:
        arguments, width, _ = block
        batch, tokens, _ = x.shape
        x = np.require(x, requirements=("C", "W"))
        x = floats("x", x, batch, tokens, width)
        kept = min(kept, tokens)
        self._run(operation, ctypes.addressof(arguments), batch, tokens, kept, x)
        return x[:, :kept]

    def _bits(self, weight: Array, k: int) -> Array:
        return self._products.prepare_binary(weight, k).panels


def _addresses(arrays: Iterable[Array | None]) -> list[int | None]:
    return [None if x is None else address(x) for x in arrays]

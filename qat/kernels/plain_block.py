"""A whole transformer block in one call: `plain`, binary throughout, with static thresholds.

Between its two sums of floats such a block holds bits only. What follows a dot product up to the
next sign, a bias, a GELU, a threshold, is a pair of bounds for each channel (`qat.kernels.bounds`).
"""

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from qat.kernels.arrays import Array, Lay, checked, floats, words

_POINTERS = (
    *("norm1_weight", "norm1_bias", "norm1_threshold"),
    *("qkv_weight", "qkv_low", "qkv_high", "context_low", "context_high"),
    *("proj_weight", "proj_scale", "proj_bias"),
    *("norm2_weight", "norm2_bias", "norm2_threshold"),
    *("fc1_weight", "fc1_low", "fc1_high"),
    *("fc2_weight", "fc2_scale", "fc2_bias"),
)


class Arguments(ctypes.Structure):
    """`PlainBlock` of `blocks.h`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("heads", "dim", "hidden")),
        *((name, ctypes.c_float) for name in ("eps", "logit_scale", "map_scale")),
    )


@dataclass(frozen=True)
class PlainBlock:
    """What the block computes with.

    Attributes:
        norm1: Weight, bias and threshold (width,) of the sign after the first LayerNorm.
        qkv: Bits of the weight (3 * width, words), low and high bounds of its dot products.
        context: Low and high bounds (width,) of the sums of attention.
        proj: Bits of the weight, scale and bias (width,).
        norm2: As `norm1`.
        fc1: As `qkv`, (hidden, words).
        fc2: As `proj`.
        heads: Number of heads; the width of each is a multiple of 64.
        eps: Of the LayerNorms.
        logit_scale: Multiplies the logits.
        map_scale: Value of the attention map where it is not 0.
    """

    norm1: tuple[Array, Array, Array]
    qkv: tuple[Array, Array, Array]
    context: tuple[Array, Array]
    proj: tuple[Array, Array, Array]
    norm2: tuple[Array, Array, Array]
    fc1: tuple[Array, Array, Array]
    fc2: tuple[Array, Array, Array]
    heads: int
    eps: float
    logit_scale: float
    map_scale: float

    @property
    def width(self) -> int:
        """Features of a token."""
        return len(self.norm1[0])

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Features between the layers of the MLP."""
        return len(self.fc1[0])

    def arrays(self, lay: Lay) -> Iterator[Array]:
        """Its arrays, in the order of `Arguments`."""
        width, hidden = self.width, self.hidden
        yield from _floats(self.norm1, width)
        yield _bits(lay, self.qkv[0], 3 * width, width)
        yield from _bounds(self.qkv[1:], 3 * width)
        yield from _bounds(self.context, width)
        yield _bits(lay, self.proj[0], width, width)
        yield from _floats(self.proj[1:], width)
        yield from _floats(self.norm2, width)
        yield _bits(lay, self.fc1[0], hidden, width)
        yield from _bounds(self.fc1[1:], hidden)
        yield _bits(lay, self.fc2[0], width, hidden)
        yield from _floats(self.fc2[1:], width)


def _floats(parts: Iterable[Array], n: int) -> Iterator[Array]:
    return (floats("block", part, n) for part in parts)


def _bits(lay: Lay, weight: Array, n: int, k: int) -> Array:
    return lay(checked("weight", weight, np.uint64, (n, words(k))), k)


def _bounds(parts: Iterable[Array], n: int) -> Iterator[Array]:
    return (checked("bounds", part, np.int32, (n,)) for part in parts)

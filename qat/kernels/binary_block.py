"""Any transformer block that is binary throughout, in one call, with floats between its layers.

Its layers may be `react` layers, its thresholds may follow the image, heads may have any width.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qat.kernels.arrays import Array, Lay, checked, floats, require_multiple, words

Pair = tuple[Array, Array]

_OF_LAYER = (
    *("threshold", "gain", "weight", "scale", "bias"),
    *("norm_weight", "norm_bias", "before", "slope", "after"),
)
_OF_BLOCK = (
    *("norm1_weight", "norm1_bias", "vector_threshold", "vector_gain"),
    *("context_weight", "context_bias", "norm2_weight", "norm2_bias"),
)
_LAYERS = ("qkv", "proj", "fc1", "fc2")


class LayerArguments(ctypes.Structure):
    """`BinaryLayer` of `blocks.h`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _OF_LAYER),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    )


class Arguments(ctypes.Structure):
    """`BinaryBlock` of `blocks.h`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _OF_BLOCK),
        *((name, LayerArguments) for name in _LAYERS),
        ("heads", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("eps", "react_eps", "logit_scale", "map_scale")),
    )


@dataclass(frozen=True)
class BinaryLayer:
    """A layer of signs.

    Attributes:
        threshold: Of its input (inputs,).
        gain: Weight of the input's mean over tokens in the threshold (inputs,); None for none.
        weight: Bits (outputs, words).
        scale: Of each output (outputs,).
        bias: Of each output (outputs,), or None.
        tail: Weight and bias of the norm, `before`, `slope` and `after` of a `react` layer, each
            (outputs,); None of a plain one.
    """

    threshold: Array
    gain: Array | None
    weight: Array
    scale: Array
    bias: Array | None
    tail: tuple[Array, ...] | None

    @property
    def inputs(self) -> int:
        """Features of its input."""
        return len(self.threshold)

    @property
    def outputs(self) -> int:
        """Features of its output."""
        return len(self.scale)

    def arrays(self, lay: Lay) -> Iterator[Array | None]:
        """Its arrays, in the order of `LayerArguments`."""
        n, k = self.outputs, self.inputs
        yield _floats(self.threshold, k)
        yield _floats(self.gain, k)
        yield lay(checked("weight", self.weight, np.uint64, (n, words(k))), k)
        for part in (self.scale, self.bias, *(self.tail or (None,) * 5)):
            yield _floats(part, n)


@dataclass(frozen=True)
class BinaryBlock:
    """What the block computes with.

    Attributes:
        norm1: Weight and bias of the first LayerNorm, each (width,).
        qkv: The layer that gives queries, keys and values.
        vector_threshold: Of the signs of these (3 * width,).
        vector_gain: Weight of their mean over tokens (3 * width,); None for none.
        context: Weight and bias of the norm of the context, each (head_dim,), to which query, key
            and value are added; None where there is no such shortcut.
        proj: The layer behind attention.
        norm2: As `norm1`.
        fc1: The first layer of the MLP; without a tail a GELU follows.
        fc2: The second.
        heads: Number of heads.
        eps: Of the LayerNorms of the block.
        react_eps: Of those of layers and context.
        logit_scale: Multiplies the logits.
        map_scale: Value of the attention map where it is not 0.
    """

    norm1: Pair
    qkv: BinaryLayer
    vector_threshold: Array
    vector_gain: Array | None
    context: Pair | None
    proj: BinaryLayer
    norm2: Pair
    fc1: BinaryLayer
    fc2: BinaryLayer
    heads: int
    eps: float
    react_eps: float
    logit_scale: float
    map_scale: float

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.proj.outputs

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.width // self.heads

    @property
    def layers(self) -> tuple[BinaryLayer, ...]:
        """Its layers.

        Raises:
            ValueError: If one does not take what the one before gives.
        """
        width, hidden = self.width, self.fc1.outputs
        layers = self.qkv, self.proj, self.fc1, self.fc2
        wanted = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]
        if [(layer.inputs, layer.outputs) for layer in layers] != wanted or width % self.heads:
            raise ValueError(f"the layers of the block do not fit {self.heads} heads and {width}")
        for layer in layers:
            if layer.tail is not None:
                require_multiple(layer.inputs, layer.outputs)
        return layers

    def arrays(self) -> Iterator[Array | None]:
        """Arrays outside its layers, in the order of `Arguments`."""
        for part in self.norm1:
            yield _floats(part, self.width)
        for part in (self.vector_threshold, self.vector_gain):
            yield _floats(part, 3 * self.width)
        for part in self.context or (None, None):
            yield _floats(part, self.head_dim)
        for part in self.norm2:
            yield _floats(part, self.width)


def _floats(x: Array | None, size: int) -> Array | None:
    return None if x is None else floats("block", x, size)

"""A whole block as one native operation, where all its products are binary.

The answer is that of the operations one by one. A `plain` block whose thresholds do not follow the
image holds bits only between its sums: what the operations do to a dot product is tabulated over
its few values. Any other block holds floats between its layers.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from qat.kernels import BinaryBlock, BinaryLayer, PlainBlock, bounds
from qat.packed.bits import words
from qat.packed.network import OPERANDS, Form, Network
from qat.runtime.grids import Grid, Sign
from qat.runtime.layers import Parts, Stored

Values = Callable[[np.ndarray], np.ndarray]
Whole = Callable[[np.ndarray, int], np.ndarray]
"""From tokens to the first so many that the block gives."""
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
VECTORS = ("query", "key", "value")
TAIL = ("norm.weight", "norm.bias", "act.before", "act.slope", "act.after")
"""Tensors of the tail of a `react` layer."""
OTHERS = ("attn.q_norm.weight", "attn.norm.weight", "mlp.norm.weight", "ls1.gamma", "ls2.gamma")
"""Tensors of what a fused block does without."""


def fused(parts: Parts, network: Network, name: str, dim: int) -> Whole | None:
    """The block (batch, tokens, dim) as one operation; None where it is another kind of block.

    Args:
        parts: What it is made of.
        network: The network it is part of.
        name: Its name.
        dim: Width.
    """
    run = parts.operations
    if "binary_block" not in run or not _is_binary(parts, name):
        return None
    if _is_plain(parts, network, name, dim):
        with suppress(ValueError):  # a sign that changes too often is no pair of bounds
            plain = run["prepare_plain_block"](_plain_block(parts, network, name, dim))
            return lambda x, kept: run["plain_block"](x, plain, kept)
    block = run["prepare_binary_block"](_binary_block(parts, network, name, dim))
    return lambda x, kept: run["binary_block"](x, block, kept)


def _is_binary(parts: Parts, name: str) -> bool:
    layers = [f"{name}.{layer}" for layer in LAYERS]
    grids = [_grid(parts, layer, "input") for layer in layers]
    grids += [_grid(parts, f"{name}.attn", operand) for operand in VECTORS]
    return (
        all(parts.operands.get(layer, {}).get("weight") == "b1" for layer in layers)
        and all(isinstance(grid, Sign) for grid in grids)
        and parts.operands.get(f"{name}.attn", {}).get("attention") == "map"
        and not {f"{name}.{other}" for other in OTHERS} & set(parts.tensors)
    )


def _is_plain(parts: Parts, network: Network, name: str, dim: int) -> bool:
    layers = [f"{name}.{layer}" for layer in LAYERS]
    signs = [_sign(parts, layer, "input") for layer in layers]
    signs += [_sign(parts, f"{name}.attn", operand) for operand in VECTORS]
    return (
        all(sign.gain is None for sign in signs)
        and dim % (64 * network.heads) == 0
        and not {*network.react, *network.context} & {*layers, f"{name}.attn"}
    )


def _grid(parts: Parts, module: str, operand: str) -> Grid | None:
    return parts.grids.get(f"{module}.{OPERANDS[operand]}")


def _sign(parts: Parts, module: str, operand: str) -> Sign:
    grid = _grid(parts, module, operand)
    assert isinstance(grid, Sign)
    return grid


def _plain_block(parts: Parts, network: Network, name: str, dim: int) -> PlainBlock:
    """What the operation on bits computes with.

    Raises:
        ValueError: If a tensor has another size than it should, or a sign changes too often.
    """
    qkv, proj, fc1, fc2 = (_Layer(parts, f"{name}.{layer}") for layer in LAYERS)
    prefix = sum(parts.tensors[one].size // dim for one in network.prefix)
    tokens = network.num_patches + prefix
    counts = np.arange(-tokens, tokens + 1, dtype=np.int32)
    common = _common(parts, network, name, dim)
    contexts = np.float32(common["map_scale"]) * counts.astype(np.float32)
    return PlainBlock(
        norm1=(*_norm(parts, f"{name}.norm1", dim), qkv.threshold),
        qkv=(qkv.words, *qkv.bounds(_of_vectors(parts, name, "fixed"))),
        context=bounds(contexts >= proj.threshold[:, None], counts),
        proj=(proj.words, proj.scale, proj.bias),
        norm2=(*_norm(parts, f"{name}.norm2", dim), fc1.threshold),
        fc1=(fc1.words, *fc1.bounds(fc2.threshold, parts.operations["gelu"])),
        fc2=(fc2.words, fc2.scale, fc2.bias),
        **common,
    )


def _binary_block(parts: Parts, network: Network, name: str, dim: int) -> BinaryBlock:
    """What the operation with floats between layers computes with.

    Raises:
        ValueError: If a tensor has another size than it should.
    """
    attention = f"{name}.attn"
    qkv, proj, fc1, fc2 = (_Layer(parts, f"{name}.{layer}").whole(network) for layer in LAYERS)
    gains = [_sign(parts, attention, operand).gain is not None for operand in VECTORS]
    context = None
    if attention in network.context:
        context = _norm(parts, f"{attention}.context.norm", dim // network.heads)
    return BinaryBlock(
        norm1=_norm(parts, f"{name}.norm1", dim),
        qkv=qkv,
        vector_threshold=_of_vectors(parts, name, "fixed"),
        vector_gain=_of_vectors(parts, name, "gain") if any(gains) else None,
        context=context,
        proj=proj,
        norm2=_norm(parts, f"{name}.norm2", dim),
        fc1=fc1,
        fc2=fc2,
        react_eps=network.react_eps,
        **_common(parts, network, name, dim),
    )


def _common(parts: Parts, network: Network, name: str, dim: int) -> dict[str, Any]:
    """What both kinds compute with."""
    grid = _grid(parts, f"{name}.attn", "attention")
    assert grid is not None
    return {
        "heads": network.heads,
        "eps": network.eps,
        "logit_scale": (dim // network.heads) ** -0.5,
        "map_scale": float(grid.scale(np.zeros(1))),
    }


def _of_vectors(parts: Parts, name: str, part: str) -> np.ndarray:
    """`fixed` or `gain` of query, key and value, one after the other; zeros where there is none."""
    signs = [_sign(parts, f"{name}.attn", operand) for operand in VECTORS]
    found = [(getattr(sign, part), sign.fixed) for sign in signs]
    made = [np.zeros_like(fixed) if value is None else value for value, fixed in found]
    return np.concatenate([one.reshape(-1) for one in made])


class _Layer:
    """A binary layer: bits, scale and bias of its weight, threshold of its input."""

    def __init__(self, parts: Parts, name: str) -> None:
        rows = parts.tensors[f"{name}.weight"]
        self.parts, self.name, sign = parts, name, _sign(parts, name, "input")
        self.threshold = sign.fixed.reshape(-1)
        self.gain = None if sign.gain is None else sign.gain.reshape(-1)
        self.k, n = len(self.threshold), len(rows)
        stored = Stored.read(parts, name, Form("b"), n, self.k)
        self.words, self.scale = words(stored.rows), stored.scale
        bias = parts.optional(f"{name}.bias", n)
        self.bias = np.zeros(n, np.float32) if bias is None else bias

    def whole(self, network: Network) -> BinaryLayer:
        """The layer with its tail."""
        name, n, tail = self.name, len(self.scale), None
        if name in network.react:
            tail = tuple(self.parts.vector(f"{name}.{one}", n) for one in TAIL)
        return BinaryLayer(self.threshold, self.gain, self.words, self.scale, self.bias, tail)

    def bounds(
        self, threshold: np.ndarray, activation: Values | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of the dot products whose output, after an activation, reaches a threshold."""
        dots = np.arange(-self.k, self.k + 1, 2, dtype=np.int32)
        values = self.scale[:, None] * dots.astype(np.float32) + self.bias[:, None]
        values = values if activation is None else activation(values)
        return bounds(values >= threshold[:, None], dots)


def _norm(parts: Parts, name: str, dim: int) -> tuple[np.ndarray, np.ndarray]:
    return parts.vector(f"{name}.weight", dim), parts.vector(f"{name}.bias", dim)

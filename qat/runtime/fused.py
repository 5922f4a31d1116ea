"""A whole block as one native operation, where all that it holds between its sums are bits.

That is a `plain` block, binary throughout, whose thresholds do not follow the image. The answer is
that of the operations one by one: what they do to a dot product is tabulated over its few values.
"""

from collections.abc import Callable

import numpy as np

from qat.kernels import PlainBlock, bounds
from qat.packed.bits import words
from qat.packed.network import OPERANDS, Form, Network
from qat.runtime.grids import Grid, Sign
from qat.runtime.layers import Parts, Stored

Values = Callable[[np.ndarray], np.ndarray]
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
VECTORS = ("query", "key", "value")
OTHERS = ("attn.q_norm.weight", "attn.norm.weight", "mlp.norm.weight", "ls1.gamma", "ls2.gamma")
"""Tensors of what a fused block does without."""


def fused(parts: Parts, network: Network, name: str, dim: int) -> Values | None:
    """The block (batch, tokens, dim) as one operation; None where it is another kind of block.

    Args:
        parts: What it is made of.
        network: The network it is part of.
        name: Its name.
        dim: Width.
    """
    run = parts.operations
    if "plain_block" not in run or not _is_plain(parts, network, name, dim):
        return None
    try:
        block = _block(parts, network, name, dim)
    except ValueError:  # a sign changes too often to be a pair of bounds
        return None
    prepared = run["prepare_plain_block"](block)
    return lambda x: run["plain_block"](x, prepared)


def _is_plain(parts: Parts, network: Network, name: str, dim: int) -> bool:
    layers = [f"{name}.{layer}" for layer in LAYERS]
    attention = parts.operands.get(f"{name}.attn", {})
    grids = [_grid(parts, layer, "input") for layer in layers]
    grids += [_grid(parts, f"{name}.attn", operand) for operand in VECTORS]
    return (
        all(parts.operands.get(layer, {}).get("weight") == "b1" for layer in layers)
        and all(isinstance(grid, Sign) and grid.gain is None for grid in grids)
        and attention.get("attention") == "map"
        and dim % (64 * network.heads) == 0
        and not {*network.react, *network.context} & {*layers, f"{name}.attn"}
        and not {f"{name}.{other}" for other in OTHERS} & set(parts.tensors)
    )


def _grid(parts: Parts, module: str, operand: str) -> Grid | None:
    return parts.grids.get(f"{module}.{OPERANDS[operand]}")


def _sign(parts: Parts, module: str, operand: str) -> Sign:
    grid = _grid(parts, module, operand)
    assert isinstance(grid, Sign)
    return grid


def _block(parts: Parts, network: Network, name: str, dim: int) -> PlainBlock:
    """What the operation computes with.

    Raises:
        ValueError: If a tensor has another size than it should, or a sign changes too often.
    """
    attention, heads = f"{name}.attn", network.heads
    qkv, proj, fc1, fc2 = (_Layer(parts, f"{name}.{layer}") for layer in LAYERS)
    vectors = [_sign(parts, attention, operand).fixed for operand in VECTORS]
    signs = np.concatenate([np.broadcast_to(one, (heads, 1, dim // heads)) for one in vectors])
    grid = _grid(parts, attention, "attention")
    assert grid is not None
    map_scale = np.float32(grid.scale(signs))
    prefix = sum(parts.tensors[one].size // dim for one in network.prefix)
    tokens = network.num_patches + prefix
    counts = np.arange(-tokens, tokens + 1, dtype=np.int32)
    contexts = map_scale * counts.astype(np.float32)
    return PlainBlock(
        norm1=_norm(parts, f"{name}.norm1", qkv),
        qkv=(qkv.words, *qkv.bounds(signs.reshape(-1))),
        context=bounds(contexts >= proj.threshold[:, None], counts),
        proj=(proj.words, proj.scale, proj.bias),
        norm2=_norm(parts, f"{name}.norm2", fc1),
        fc1=(fc1.words, *fc1.bounds(fc2.threshold, parts.operations["gelu"])),
        fc2=(fc2.words, fc2.scale, fc2.bias),
        heads=heads,
        eps=network.eps,
        logit_scale=(dim // heads) ** -0.5,
        map_scale=float(map_scale),
    )


class _Layer:
    """A binary layer: bits, scale and bias of its weight, threshold of its input."""

    def __init__(self, parts: Parts, name: str) -> None:
        rows = parts.tensors[f"{name}.weight"]
        self.threshold = _sign(parts, name, "input").fixed.reshape(-1)
        self.k, n = len(self.threshold), len(rows)
        stored = Stored.read(parts, name, Form("b"), n, self.k)
        self.words, self.scale = words(stored.rows), stored.scale
        bias = parts.optional(f"{name}.bias", n)
        self.bias = np.zeros(n, np.float32) if bias is None else bias

    def bounds(
        self, threshold: np.ndarray, activation: Values | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of the dot products whose output, after an activation, reaches a threshold."""
        dots = np.arange(-self.k, self.k + 1, 2, dtype=np.int32)
        values = self.scale[:, None] * dots.astype(np.float32) + self.bias[:, None]
        values = values if activation is None else activation(values)
        return bounds(values >= threshold[:, None], dots)


def _norm(parts: Parts, name: str, layer: _Layer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    dim = len(layer.threshold)
    weight, bias = parts.vector(f"{name}.weight", dim), parts.vector(f"{name}.bias", dim)
    return weight, bias, layer.threshold

"""Attention, MLP and block of a vision transformer, from the operations of the table."""

from typing import TypeGuard

import numpy as np

from qat.packed.network import OPERANDS, Network
from qat.runtime.fused import TAIL, fused
from qat.runtime.grids import Grid, Numbers, See, Sign, Uniform, unseen
from qat.runtime.layers import Layer, Parts
from qat.runtime.operations import EXACT_FLOAT32


class Norm:
    """Layer normalization.

    Args:
        parts: What it is made of.
        name: Its name.
        dim: Width.
        eps: Added to the variance.
    """

    def __init__(self, parts: Parts, name: str, dim: int, eps: float) -> None:
        self.run, self.dim, self.eps = parts.operations["layer_norm"], dim, eps
        self.weight = parts.vector(f"{name}.weight", dim)
        self.bias = parts.vector(f"{name}.bias", dim)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Normalized over the last axis."""
        rows = np.ascontiguousarray(x).reshape(-1, self.dim)
        return self.run(rows, self.weight, self.bias, self.eps).reshape(x.shape)


def norm_or_none(parts: Parts, name: str, dim: int, eps: float) -> Norm | None:
    """A normalization that a network may have."""
    present = any(f"{name}.{one}" in parts.tensors for one in ("weight", "bias"))
    return Norm(parts, name, dim, eps) if present else None


class Linear:
    """A layer, with what follows it in a `react` block.

    Args:
        parts: What it is made of.
        network: The network it is part of.
        name: Its name.
        k: Width of its input.
    """

    def __init__(self, parts: Parts, network: Network, name: str, k: int) -> None:
        self.layer, self.run, self.eps = Layer(parts, name, k), parts.operations, network.react_eps
        self.num_outputs = n = self.layer.num_outputs
        self.follows = name in network.react
        self.tail = [parts.vector(f"{name}.{one}", n) for one in TAIL] if self.follows else []
        if self.follows and max(k, n) % min(k, n):
            raise ValueError(f"'{name}' has no shortcut from {k} to {n} features")

    def __call__(self, x: np.ndarray, see: See) -> np.ndarray:
        """The output (..., outputs)."""
        y = self.layer(x, see)
        if not self.follows:
            return y
        weight, bias, *bend = self.tail
        rows = np.ascontiguousarray(x.reshape(-1, x.shape[-1]))
        out = self.run["react"](
            y.reshape(-1, self.num_outputs), rows, weight, bias, self.eps, *bend
        )
        return out.reshape(y.shape)


class Product:
    """A product of two activations.

    Args:
        parts: What it is made of.
        module: Name of the attention.
        left: Its left operand.
        right: Its right operand.
        heads: Heads of the attention.
        head_dim: Width of a head.
    """

    def __init__(
        self, parts: Parts, module: str, left: str, right: str, heads: int, head_dim: int
    ) -> None:
        self.left, self.right = (
            parts.grid(module, operand, (heads, 1, 1 if operand == "attention" else head_dim))
            for operand in (left, right)
        )
        self.names = [f"{module}.{OPERANDS[operand]}" for operand in (left, right)]

    def __call__(
        self, left: np.ndarray, right: np.ndarray, see: See, *, transpose_right: bool = False
    ) -> np.ndarray:
        """The product of both operands on their grids."""
        for name, operand in zip(self.names, (left, right), strict=True):
            see(name, operand)
        a, a_scale = _factors(self.left, left)
        b, b_scale = _factors(self.right, right)
        b = b.swapaxes(-1, -2) if transpose_right else b
        most = a.shape[-1]
        for grid in (self.left, self.right):
            most *= (grid and grid.largest) or 0
        if most >= EXACT_FLOAT32:
            a, b = a.astype(np.float64), b.astype(np.float64)
        return (a @ b).astype(np.float32) * (a_scale * b_scale)


def _factors(grid: Grid | None, x: np.ndarray) -> tuple[np.ndarray, Numbers]:
    """An operand as steps and one scale, or as values and 1."""
    if grid is None:
        return x, np.float32(1)
    if grid.largest is None or grid.scale(x).ndim:
        return grid.values(x), np.float32(1)
    return grid.steps(x), grid.scale(x)


class Attention:
    """Self-attention.

    Args:
        parts: What it is made of.
        network: The network it is part of.
        name: Its name.
        dim: Width of its input.
    """

    def __init__(self, parts: Parts, network: Network, name: str, dim: int) -> None:
        self.run, self.name, self.heads = parts.operations, name, network.heads
        self.qkv = Linear(parts, network, f"{name}.qkv", dim)
        inner, rest = divmod(self.qkv.num_outputs, 3)
        self.head_dim, uneven = divmod(inner, network.heads)
        if rest or uneven:
            raise ValueError(f"'{name}.qkv' does not give {network.heads} heads")
        self.query_norm, self.key_norm = (
            norm_or_none(parts, f"{name}.{one}", self.head_dim, network.eps)
            for one in ("q_norm", "k_norm")
        )
        shape = self.heads, self.head_dim
        self.qk = Product(parts, name, "query", "key", *shape)
        self.av = Product(parts, name, "attention", "value", *shape)
        self.context = (
            Norm(parts, f"{name}.context.norm", self.head_dim, network.react_eps)
            if name in network.context
            else None
        )
        self.norm = norm_or_none(parts, f"{name}.norm", inner, network.eps)
        self.proj = Linear(parts, network, f"{name}.proj", inner)

    def __call__(self, x: np.ndarray, see: See) -> np.ndarray:
        """Attention among the tokens of (batch, tokens, dim)."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x, see).reshape(batch, tokens, 3, self.heads, self.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            parts = self.query_norm(qkv[:, :, 0]), self.key_norm(qkv[:, :, 1]), qkv[:, :, 2]
            qkv = np.stack(parts, 2)
        query, key, value = qkv.transpose(2, 0, 3, 1, 4)
        signs = [
            one for one in (self.qk.left, self.qk.right, self.av.right) if isinstance(one, Sign)
        ]
        if len(signs) == 3 and _is_map(self.av.left):
            context = self._binary(qkv, signs, float(self.av.left.size), see)
        else:
            context = self._products(query, key, value, see)
        if self.context is not None:
            added = self.context(context.swapaxes(1, 2)) + query + key + value
            context = np.ascontiguousarray(added.swapaxes(1, 2))
        context = context.reshape(batch, tokens, self.heads * self.head_dim)
        return self.proj(context if self.norm is None else self.norm(context), see)

    def _products(
        self, query: np.ndarray, key: np.ndarray, value: np.ndarray, see: See
    ) -> np.ndarray:
        """Context by products of any operands, (batch, tokens, heads, dim)."""
        logits = self.qk(query, key, see, transpose_right=True)
        logits *= np.float32(self.head_dim**-0.5)
        attention = self.run["softmax"](logits)
        return np.ascontiguousarray(self.av(attention, value, see).swapaxes(1, 2))

    def _binary(self, qkv: np.ndarray, signs: list[Sign], map_scale: float, see: See) -> np.ndarray:
        """Context by the operation for binary operands, (batch, tokens, heads, dim)."""
        names = (*self.qk.names, self.av.names[1])
        thresholds = []
        for grid, name, x in zip(signs, names, qkv.transpose(2, 0, 3, 1, 4), strict=True):
            see(name, x)
            thresholds.append(grid.thresholds(x).swapaxes(1, 2)[:, 0])
        most = max(len(threshold) for threshold in thresholds)
        threshold = np.stack([np.resize(one, (most, *one.shape[1:])) for one in thresholds])
        return self.run["binary_attention"](qkv, threshold, self.head_dim**-0.5, map_scale)


def _is_map(grid: Grid | None) -> TypeGuard[Uniform]:
    return isinstance(grid, Uniform) and (grid.low, grid.high) == (0, 1)


class Mlp:
    """Two layers with a GELU between them, which RPReLU replaces in a `react` block.

    Args:
        parts: What it is made of.
        network: The network it is part of.
        name: Its name.
        dim: Width of its input.
    """

    def __init__(self, parts: Parts, network: Network, name: str, dim: int) -> None:
        self.gelu = parts.operations["gelu"]
        self.fc1 = Linear(parts, network, f"{name}.fc1", dim)
        self.norm = norm_or_none(parts, f"{name}.norm", self.fc1.num_outputs, network.eps)
        self.fc2 = Linear(parts, network, f"{name}.fc2", self.fc1.num_outputs)

    def __call__(self, x: np.ndarray, see: See) -> np.ndarray:
        """Both layers."""
        x = self.fc1(x, see)
        x = x if self.fc1.follows else self.gelu(x)
        return self.fc2(x if self.norm is None else self.norm(x), see)


class Block:
    """Attention and MLP, each behind a LayerNorm and beside a shortcut.

    Args:
        parts: What it is made of.
        network: The network it is part of.
        name: Its name.
        dim: Width.
    """

    def __init__(self, parts: Parts, network: Network, name: str, dim: int) -> None:
        self.norm1, self.norm2 = (
            Norm(parts, f"{name}.{norm}", dim, network.eps) for norm in ("norm1", "norm2")
        )
        self.attn = Attention(parts, network, f"{name}.attn", dim)
        self.mlp = Mlp(parts, network, f"{name}.mlp", dim)
        self.gains = [parts.optional(f"{name}.{gain}.gamma", dim) for gain in ("ls1", "ls2")]
        self.fused = fused(parts, network, name, dim)

    def __call__(self, x: np.ndarray, see: See, kept: int) -> np.ndarray:
        """The first `kept` tokens after the block, which may be in the memory of those before."""
        if self.fused is not None and see is unseen:
            return self.fused(x, kept)
        first, second = self.gains
        x = x + _scaled(self.attn(self.norm1(x), see), first)
        return (x + _scaled(self.mlp(self.norm2(x), see), second))[:, :kept]


def _scaled(x: np.ndarray, gain: np.ndarray | None) -> np.ndarray:
    return x if gain is None else x * gain

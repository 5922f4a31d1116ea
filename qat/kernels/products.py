"""Operations that multiply: layers of bits, integers and floats, attention."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qat.kernels.arrays import (
    Array,
    Bits,
    Floats,
    Integers,
    checked,
    floats,
    pairs_of,
    panels_of,
    words,
)
from qat.kernels.native import Native


@dataclass(frozen=True)
class Prepared:
    """A weight (n, k) in the layout of an instruction set."""

    kind: str
    n: int
    k: int
    panels: Array


class Products:
    """Operations that multiply, by the kernels of an instruction set.

    Args:
        native: The kernels.
    """

    def __init__(self, native: Native) -> None:
        self._run, self._name = native.run, native.name

    def prepare_binary(self, weight: Bits, k: int) -> Prepared:
        """Bits of a weight (n, words), for the binary layers below."""
        n = len(weight)
        weight = checked("weight", weight, np.uint64, (n, words(k)))
        panels = panels_of(n, words(k), np.uint64)
        self._run("prepare_binary", weight, n, words(k), panels)
        return Prepared(f"binary {self._name}", n, k, panels)

    def prepare_linear(self, weight: Floats) -> Prepared:
        """A float weight (n, k)."""
        n, k = weight.shape
        weight = checked("weight", weight, np.float32, (n, k))
        panels = panels_of(n, k, np.float32)
        self._run("prepare_linear", weight, n, k, panels)
        return Prepared("float", n, k, panels)

    def prepare_integer(self, weight: NDArray[np.integer], largest: int) -> Prepared:
        """An integer weight (n, k), for steps of at most `largest`.

        Where a value is too large for 16 bits or a sum for 32, NumPy multiplies in float64.
        """
        n, k = weight.shape
        heaviest = int(np.abs(weight.astype(np.int64)).max(initial=0))
        if max(largest, heaviest) >= 1 << 15 or k * largest * heaviest >= 1 << 31:
            return Prepared("integer", n, k, weight.astype(np.float64))
        pairs = pairs_of(weight)
        panels = panels_of(n, pairs.shape[1], np.int32)
        self._run("prepare_linear", pairs, n, pairs.shape[1], panels)
        return Prepared("integer", n, k, panels)

    def binary_gemm(self, bits: Bits, weight: Prepared, k: int) -> Integers:
        """Dot products (rows, n) of -1 and +1."""
        y = np.empty((len(bits), weight.n), np.int32)
        self._run("binary_gemm", *self._binary(bits, weight, k), len(bits), weight.n, k, y)
        return y

    def binary_linear(
        self,
        bits: Bits,
        weight: Prepared,
        k: int,
        scale: Floats,
        bias: Floats | None,
        residual: Floats | None = None,
    ) -> Floats:
        """`scale * dot + bias + residual`, (rows, n)."""
        rows, n = len(bits), weight.n
        bias = None if bias is None else floats("bias", bias, n)
        residual = None if residual is None else floats("residual", residual, rows, n)
        operands = self._binary(bits, weight, k)
        y = np.empty((rows, n), np.float32)
        scale = floats("scale", scale, n)
        self._run("binary_linear", *operands, scale, bias, residual, rows, n, k, y)
        return y

    def binary_linear_bits(
        self, bits: Bits, weight: Prepared, k: int, low: Integers, high: Integers
    ) -> Bits:
        """Bits (rows, words of n) of `dot <= low or dot >= high`, see `qat.kernels.bounds`."""
        rows, n = len(bits), weight.n
        operands = self._binary(bits, weight, k)
        packed = np.empty((rows, words(n)), np.uint64)
        limits = checked("low", low, np.int32, (n,)), checked("high", high, np.int32, (n,))
        self._run("binary_linear_bits", *operands, *limits, rows, n, k, packed)
        return packed

    def _binary(self, bits: Bits, weight: Prepared, k: int) -> tuple[Bits, Array]:
        _require_kind(weight, f"binary {self._name}", k)
        return checked("bits", bits, np.uint64, (len(bits), words(k))), weight.panels

    def binary_attention(
        self, qkv: Floats, threshold: Floats, logit_scale: float, map_scale: float
    ) -> Floats:
        """Binary attention of qkv (batch, tokens, 3, heads, dim) by signs and a map of 0 and s."""
        batch, tokens, _, heads, dim = qkv.shape
        require_attention(dim, logit_scale)
        qkv = floats("qkv", qkv, batch, tokens, 3, heads, dim)
        count = threshold.shape[1]
        threshold = floats("threshold", threshold, 3, batch if count != 1 else 1, heads, dim)
        y = np.empty((batch, tokens, heads, dim), np.float32)
        sizes = batch, tokens, heads, dim, count
        self._run("binary_attention", qkv, threshold, logit_scale, map_scale, *sizes, y)
        return y

    def binary_attention_bits(
        self,
        bits: Bits,
        dim: int,
        logit_scale: float,
        map_scale: float,
        low: Integers,
        high: Integers,
    ) -> Bits:
        """The same from bits (batch, tokens, 3, heads, words) to bits, by bounds of its sums."""
        batch, tokens, _, heads, _ = bits.shape
        require_attention(dim, logit_scale)
        require_words(dim)
        bits = checked("bits", bits, np.uint64, (batch, tokens, 3, heads, words(dim)))
        width = heads * dim
        limits = (
            checked("low", low, np.int32, (width,)),
            checked("high", high, np.int32, (width,)),
        )
        packed = np.empty((batch, tokens, words(width)), np.uint64)
        sizes = batch, tokens, heads, dim
        self._run("binary_attention_bits", bits, *limits, logit_scale, map_scale, *sizes, packed)
        return packed

    def linear(self, x: Floats, weight: Prepared, bias: Floats | None) -> Floats:
        """`x weight^T + bias`, x (rows, k)."""
        rows, k = x.shape
        _require_kind(weight, "float", k)
        bias = None if bias is None else floats("bias", bias, weight.n)
        y = np.empty((rows, weight.n), np.float32)
        self._run("linear", floats("x", x), weight.panels, bias, rows, weight.n, k, y)
        return y

    def integer_linear(
        self, steps: Floats, weight: Prepared, scale: Floats, bias: Floats | None
    ) -> Floats:
        """`scale * (steps weight^T) + bias`, exact in integers, steps (rows, k)."""
        rows, k = steps.shape
        _require_kind(weight, "integer", k)
        bias = None if bias is None else floats("bias", bias, weight.n)
        scale = floats("scale", scale, weight.n)
        if weight.panels.dtype == np.float64:
            product = scale * (steps.astype(np.float64) @ weight.panels.T).astype(np.float32)
            return product if bias is None else product + bias
        pairs, y = pairs_of(steps), np.empty((rows, weight.n), np.float32)
        sizes = rows, weight.n, pairs.shape[1]
        self._run("integer_linear", pairs, weight.panels, scale, bias, *sizes, y)
        return y


def _require_kind(weight: Prepared, kind: str, k: int) -> None:
    if weight.kind != kind or weight.k != k:
        raise ValueError(
            f"the weight was prepared as {weight.kind} with {weight.k} inputs, this operation "
            f"needs {kind} with {k}"
        )


def require_attention(dim: int, logit_scale: float) -> None:
    """Refuse heads that the kernels of attention do not take."""
    if dim > 4096 or not logit_scale > 0:
        raise ValueError(
            f"heads have at most 4096 features and a positive scale, got {dim} and {logit_scale}"
        )


def require_words(dim: int) -> None:
    """Refuse heads whose bits end within a word."""
    if dim % 64:
        raise ValueError(f"bits of heads of {dim} do not fill words; dim must divide by 64")

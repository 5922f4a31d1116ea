"""The operations that run a packed model, each by its NumPy reference.

`REFERENCE` is the one table that the runtime calls; native kernels replace its entries by name.
Arrays are contiguous: values float32, signs uint64 words (`qat.packed.bits`), sums int32. `rows`
are images times tokens. What a `prepare_` entry returns is given back to its product as `weight`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from qat.packed.bits import pack_signs

Operations = Mapping[str, Callable[..., Any]]

ROWS_AT_ONCE = 256
"""Rows of a binary product at a time, so that what lies between stays in the cache."""
EXACT_FLOAT32 = 2**24
"""Sums of integers below this are exact in float32, in any order."""


def sign_pack(x: np.ndarray, threshold: np.ndarray, gain: np.ndarray | None = None) -> np.ndarray:
    """Signs of `x - threshold - gain * (mean over rows)`, zero being positive, as words.

    Args:
        x: Values (groups, rows, k).
        threshold: Thresholds (t, k); group g takes row g mod t.
        gain: Weight (k,) of the mean of each group; None for none.
    """
    if gain is not None:
        threshold = np.resize(threshold, (len(x), x.shape[-1])) + gain * token_mean(x, (1,))[:, 0]
    repeated = np.resize(threshold, (len(x), 1, x.shape[-1]))
    return pack_signs(x >= repeated)


def token_mean(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Mean over axes, which are kept; summed in float64 and rounded once."""
    return x.mean(axes, dtype=np.float64, keepdims=True).astype(np.float32)


def prepare_binary(weight: np.ndarray, k: int) -> Any:
    """The weight as it is."""
    return weight


def binary_gemm(signs: np.ndarray, weight: np.ndarray, k: int) -> np.ndarray:
    """Products of +-1 vectors: `k - 2 popcount(a xor b)`.

    Args:
        signs: Words (rows, words).
        weight: Words (outputs, words).
        k: Elements of each vector.
    """
    out = np.empty((len(signs), len(weight)), np.int32)
    for begin in range(0, len(signs), ROWS_AT_ONCE):
        part = signs[begin : begin + ROWS_AT_ONCE]
        unequal = np.zeros((len(part), len(weight)), np.int32)
        for word in range(weight.shape[1]):
            unequal += np.bitwise_count(part[:, word, None] ^ weight[:, word])
        out[begin : begin + ROWS_AT_ONCE] = k - 2 * unequal
    return out


def binary_linear(
    signs: np.ndarray, weight: Any, k: int, scale: np.ndarray, bias: np.ndarray | None
) -> np.ndarray:
    """A binary layer: `scale * product + bias`, float32 (rows, outputs)."""
    return _scaled(binary_gemm(signs, weight, k).astype(np.float32), scale, bias)


def prepare_integer(weight: np.ndarray, largest: int) -> Any:
    """The weight (outputs, k) of int16, in a type in which its products are exact.

    A sum of products is at most `largest`, that of the input's magnitudes, times a row's sum of
    magnitudes: below 2^24 float32 is exact in any order of summation, below 2^53 float64 is.
    """
    bound = largest * int(np.abs(weight.astype(np.int64)).sum(1).max())
    return weight.astype(np.float32 if bound < EXACT_FLOAT32 else np.float64)


def integer_linear(
    steps: np.ndarray, weight: Any, scale: np.ndarray, bias: np.ndarray | None
) -> np.ndarray:
    """A layer on integers: `scale * product + bias`.

    Args:
        steps: Codes minus zero point (rows, k), integers held in float32.
        weight: What `prepare_integer` returned.
        scale: Of the outputs (outputs,): scale of the input times that of the weight.
        bias: Bias (outputs,), or None.
    """
    return _scaled((steps.astype(weight.dtype) @ weight.T).astype(np.float32), scale, bias)


def prepare_linear(weight: np.ndarray) -> Any:
    """The weight as it is."""
    return weight


def linear(x: np.ndarray, weight: Any, bias: np.ndarray | None) -> np.ndarray:
    """A layer in float32: `x weight^T + bias`."""
    return x @ weight.T if bias is None else x @ weight.T + bias


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """Layer normalization over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    variance = np.square(centred).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + np.float32(eps)) * weight + bias


def _tail(t: float) -> float:
    """`erfc(z) exp(z^2)` at `z = 2 (1 / t - 1)`, smooth in t."""
    z = 2 * (1 / t - 1)
    return math.erfc(z) * math.exp(z * z)


def _tail_polynomial() -> list[np.float32]:
    """Coefficients in t, lowest first, exact to 1e-8 for z from 0 to 4."""
    nodes = Chebyshev.interpolate(np.vectorize(_tail), 9, domain=[1 / 3, 1])
    return [np.float32(value) for value in nodes.convert(kind=Polynomial).coef]


TAIL = _tail_polynomial()


def gelu(x: np.ndarray) -> np.ndarray:
    """The exact GELU `x Phi(x)`, within 5e-7, where `Phi(-z) = erfc(z / sqrt 2) / 2`."""
    z = np.minimum(np.abs(x) * np.float32(0.5**0.5), np.float32(10))
    t = 1 / (1 + np.float32(0.5) * z)
    below = np.full_like(x, TAIL[-1])
    for coefficient in TAIL[-2::-1]:
        below *= t
        below += coefficient
    below *= np.exp(-z * z) * np.float32(0.5)
    return x * np.where(x > 0, 1 - below, below)


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def rprelu(x: np.ndarray, before: np.ndarray, slope: np.ndarray, after: np.ndarray) -> np.ndarray:
    """`PReLU(x - before) + after`, with a slope for each channel."""
    z = x - before
    return np.where(z >= 0, z, slope * z) + after


def shortcut(x: np.ndarray, num_outputs: int) -> np.ndarray:
    """Features carried past a layer: repeated to widen, groups of them averaged to narrow."""
    rows, width = x.shape
    if num_outputs >= width:
        return np.tile(x, (1, num_outputs // width))
    return x.reshape(rows, num_outputs, width // num_outputs).mean(-1)


def react(
    y: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    eps: float,
    before: np.ndarray,
    slope: np.ndarray,
    after: np.ndarray,
) -> np.ndarray:
    """What follows a binary layer in a `react` block: `rprelu(layer_norm(y) + shortcut(x))`."""
    carried = layer_norm(y, weight, bias, eps) + shortcut(x, y.shape[-1])
    return rprelu(carried, before, slope, after)


def binary_attention(
    qkv: np.ndarray, threshold: np.ndarray, logit_scale: float, map_scale: float
) -> np.ndarray:
    """Attention whose four operands are binary.

    Args:
        qkv: Query, key and value (batch, tokens, 3, heads, dim).
        threshold: Thresholds of their signs (3, t, heads, dim), t being 1 or the batch.
        logit_scale: Multiplies the logits.
        map_scale: The map is this value where the softmax exceeds half of it, else zero.

    Returns:
        The context (batch, tokens, heads, dim).
    """
    signs = np.where(qkv >= threshold.swapaxes(0, 1)[:, None], np.float32(1), np.float32(-1))
    q, k, v = signs.transpose(2, 0, 3, 1, 4)
    attention = softmax(q @ k.swapaxes(-1, -2) * np.float32(logit_scale))
    marked = np.rint(attention / np.float32(map_scale)).clip(0, 1)
    return np.ascontiguousarray((marked @ v * np.float32(map_scale)).swapaxes(1, 2))


def _scaled(product: np.ndarray, scale: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    product *= scale
    if bias is not None:
        product += bias
    return product


REFERENCE: Operations = {
    one.__name__: one
    for one in (
        sign_pack,
        prepare_binary,
        binary_gemm,
        binary_linear,
        prepare_integer,
        integer_linear,
        prepare_linear,
        linear,
        layer_norm,
        gelu,
        softmax,
        rprelu,
        shortcut,
        react,
        binary_attention,
    )
}
"""Every operation by its name."""

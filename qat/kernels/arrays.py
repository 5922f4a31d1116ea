"""Arrays as the kernels read them: checked, contiguous, with an address."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]
Integers = NDArray[np.int32]
Bits = NDArray[np.uint64]
Lay = Callable[[Array, int], Array]
"""Lays out the bits of a weight (outputs, words) of so many inputs."""

PANEL = 32
"""Columns of a prepared weight that belong together."""


def words(k: int) -> int:
    """Words of 64 bits that hold k bits."""
    return -(-k // 64)


def panels_of(n: int, width: int, dtype: Any) -> Array:
    """Memory of a prepared weight; starts at a multiple of 64 bytes, for whole loads."""
    n = -(-n // PANEL) * PANEL
    memory = np.empty(n * width * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : memory.size - 64 + start].view(dtype).reshape(n, width)


def address(x: Array) -> int:
    """Where an array starts; `x.ctypes` takes eight times as long."""
    if x.size and x.flags.writeable:
        return ctypes.addressof(ctypes.c_char.from_buffer(x))  # type: ignore[arg-type]
    return x.ctypes.data


def checked(name: str, x: Array, dtype: Any, shape: tuple[int, ...]) -> Array:
    """The array as the kernels read it: contiguous, of the type and the shape."""
    if x.dtype != dtype or x.shape != shape:
        wanted = f"{np.dtype(dtype)} {shape}"
        raise ValueError(f"{name} must be {wanted}, got {x.dtype} {x.shape}")
    return np.ascontiguousarray(x)


def floats(name: str, x: Floats, *shape: int) -> Floats:
    """The same for floats; without a shape, of any."""
    return checked(name, x, np.float32, shape or x.shape)


def thresholds_of(threshold: Floats, groups: int, k: int) -> Floats:
    """Thresholds (1 or groups, k)."""
    return floats("threshold", threshold, groups if len(threshold) != 1 else 1, k)


def pairs_of(values: Array) -> Integers:
    """Rows of 16-bit integers, two to an element, a last single one with a zero."""
    rows, k = values.shape
    padded = np.zeros((rows, k + k % 2), np.int16)
    padded[:, :k] = values
    return padded.view(np.int32)


def require_multiple(k: int, n: int) -> None:
    """Refuse a shortcut between widths neither of which is a multiple of the other."""
    if max(k, n) % min(k, n):
        raise ValueError(f"no shortcut from {k} to {n} features, neither is a multiple")

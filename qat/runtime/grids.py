"""Activations on their grids: the forms that a packed file names, each by the rule of its codes.

`steps` are integers in float32, values of the grid in units of `scale`; where a grid has none, or a
scale for each channel, its values are multiplied in floating point.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qat.packed.network import Form
from qat.runtime.operations import token_mean

Numbers = np.ndarray | np.floating[Any]
"""An array, or one number."""
Tensors = Mapping[str, np.ndarray]
See = Callable[[str, np.ndarray], None]
"""Is shown the input of each grid, by the grid's name."""


def unseen(name: str, x: np.ndarray) -> None:
    """What is shown to nobody."""


class Grid(ABC):
    """A grid of activations.

    Attributes:
        largest: Largest magnitude of a step; None where values are no integers times one scale.
    """

    largest: int | None = None

    @abstractmethod
    def codes(self, x: np.ndarray) -> np.ndarray:
        """Integer codes."""

    @abstractmethod
    def steps(self, x: np.ndarray) -> np.ndarray:
        """Values in units of the scale."""

    def scale(self, x: np.ndarray) -> Numbers:
        """Size of a step; a number, or one for each row where it follows the values."""
        return np.float32(1)

    def values(self, x: np.ndarray) -> np.ndarray:
        """Values of the grid."""
        return self.steps(x) * self.scale(x)


class Sign(Grid):
    """-1 and +1, by a threshold for each channel.

    Args:
        threshold: In the operand's trailing shape, 1 where its size varies.
        gain: Weight of the channel's mean over the tokens of the image, added to the threshold.
    """

    largest = 1

    def __init__(self, threshold: np.ndarray, gain: np.ndarray | None = None) -> None:
        self.fixed, self.gain = threshold, gain

    def thresholds(self, x: np.ndarray) -> np.ndarray:
        """Thresholds, for each image where they follow its mean; broadcast against `x`."""
        sizes = (1,) * (x.ndim - self.fixed.ndim) + self.fixed.shape
        tokens = tuple(axis for axis in range(1, x.ndim) if sizes[axis] == 1)
        if self.gain is None or not tokens:
            return self.fixed.reshape(sizes)
        return self.fixed + self.gain * token_mean(x, tokens)

    def codes(self, x: np.ndarray) -> np.ndarray:
        """-1 and +1."""
        return np.where(x >= self.thresholds(x), np.int8(1), np.int8(-1))

    def steps(self, x: np.ndarray) -> np.ndarray:
        """The codes."""
        return np.where(x >= self.thresholds(x), np.float32(1), np.float32(-1))


class Uniform(Grid):
    """Equal steps: `c = clip(round(x / s) + z, low, high)`, of value `(c - z) s`."""

    def __init__(
        self, scale: np.ndarray, zero_point: np.ndarray | None, low: int, high: int
    ) -> None:
        self.size, self.low, self.high = np.abs(scale), low, high
        self.zero_point = np.zeros_like(scale) if zero_point is None else zero_point
        if scale.size == 1 and (self.zero_point == np.rint(self.zero_point)).all():
            self.size = self.size.reshape(())
            zero = int(self.zero_point.reshape(()))
            self.largest = max(abs(low - zero), abs(high - zero))

    def codes(self, x: np.ndarray) -> np.ndarray:
        """Codes; fractions where the zero point is one."""
        return np.clip(np.rint(x / self.size) + self.zero_point, self.low, self.high)

    def steps(self, x: np.ndarray) -> np.ndarray:
        """Codes minus zero point."""
        return self.codes(x) - self.zero_point

    def scale(self, x: np.ndarray) -> Numbers:
        """Size of a step."""
        return self.size


class Token(Grid):
    """Equal steps around zero, whose size each token finds itself: `s = max |x| / high`."""

    def __init__(self, high: int) -> None:
        self.high, self.largest = high, high + 1

    def codes(self, x: np.ndarray) -> np.ndarray:
        """Codes."""
        return np.clip(np.rint(x / self.scale(x)), -self.high - 1, self.high)

    steps = codes

    def scale(self, x: np.ndarray) -> Numbers:
        """Size of each token's step."""
        most = np.abs(x).max(-1, keepdims=True)
        return np.where(most > 0, most / np.float32(self.high), np.float32(1))


class Table(Grid):
    """Levels of any spacing: the code of x / s is the number of bounds that do not exceed it."""

    def __init__(self, scale: np.ndarray, bounds: np.ndarray, levels: np.ndarray) -> None:
        self.size, self.bounds, self.levels = scale, bounds, levels
        if len(levels) != len(bounds) + 1 or (np.diff(bounds) < 0).any():
            raise ValueError("a table has one level more than bounds, and bounds ascend")

    def codes(self, x: np.ndarray) -> np.ndarray:
        """Number of the level."""
        rank = np.searchsorted(self.bounds, np.clip(x / self.size, 0, 1), side="right")
        return len(self.bounds) - rank if self.levels[0] > self.levels[-1] else rank

    def steps(self, x: np.ndarray) -> np.ndarray:
        """Levels, which are fractions."""
        return self.levels[self.codes(x)]

    def scale(self, x: np.ndarray) -> Numbers:
        """The largest level."""
        return self.size


def make_grid(form: Form, tensors: Tensors, name: str, shape: tuple[int, ...]) -> Grid:
    """The grid of a form whose tensors stand below a name.

    Args:
        form: The form.
        tensors: Arrays of the file.
        name: Name of the operand.
        shape: Trailing shape of the operand, 1 where its size varies.

    Raises:
        ValueError: If a tensor is missing, or does not fit the operand.
    """
    found = {}
    for key in form.tensors:
        value = tensors.get(f"{name}.{key}")
        if value is None and key == "zero_point":
            continue
        if value is None or value.dtype != np.float32 or not _fits(form, key, value.shape, shape):
            raise ValueError(f"tensor '{name}.{key}' is missing, or does not fit {shape}")
        found[key] = value
    return MAKERS[form.kind](found, form)


def _fits(form: Form, key: str, found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a form has a shape that goes with that of the operand."""
    if form.kind == "table":
        return len(found) == (key != "scale")
    if form.kind.startswith("sign"):
        return found == shape
    return found in ((), (shape[0], *(1 for _ in shape[1:])))


def _uniform(get: Tensors, form: Form) -> Grid:
    zero_point = get.get("zero_point")
    return Uniform(get["scale"], zero_point, form.low, form.high)


def _standardized(get: Tensors, form: Form) -> Grid:
    deviation = np.sqrt(get["shift.variance"] + np.float32(1e-6))
    return Sign(get["shift.mean"] + get["shift.shift"] * deviation)


MAKERS: Mapping[str, Callable[[Tensors, Form], Any]] = {
    "sign": lambda get, form: Sign(get["shift.shift"]),
    "sign-mean": lambda get, form: Sign(get["shift.shift"], get["shift.gain"]),
    "sign-scaled": lambda get, form: Sign(get["shift.shift"]),
    "sign-standardized": _standardized,
    "map": lambda get, form: Uniform(get["scale"], None, 0, 1),
    "s": _uniform,
    "u": _uniform,
    "token": lambda get, form: Token(form.high),
    "table": lambda get, form: Table(get["scale"], get["bounds"], get["levels"]),
}

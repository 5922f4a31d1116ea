"""Layers with a weight, by what their operands are: bits, integers, or values in floating point."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from qat.packed import Packed, row_bytes, unpack_codes
from qat.packed.bits import words
from qat.packed.network import OPERANDS, Form, Network
from qat.runtime.grids import Grid, See, Sign, make_grid
from qat.runtime.operations import Operations

MOST_BITS = 14
"""Widest weights whose codes minus zero point int16 holds."""
Multiply = Callable[[np.ndarray], np.ndarray]
"""From the input of a layer (..., k) to its output (..., outputs)."""


@dataclass(frozen=True)
class Parts:
    """What a layer is made of.

    Attributes:
        tensors: Arrays of the file, in float32 where they are no codes.
        operations: The table of operations.
        operands: For each module, the form of each quantized operand.
        grids: Grid of each activation, by name, once it is asked for.
    """

    tensors: Mapping[str, np.ndarray]
    operations: Operations
    operands: Mapping[str, Mapping[str, str]]
    grids: dict[str, Grid] = field(default_factory=dict)

    @staticmethod
    def of(packed: Packed, network: Network, operations: Operations) -> "Parts":
        """The parts of a file."""
        tensors = {name: _widened(value) for name, value in packed.tensors.items()}
        return Parts(tensors, operations, network.operands)

    def grid(self, module: str, operand: str, shape: tuple[int, ...]) -> Grid | None:
        """The grid of an operand of a trailing shape; None where it is in float."""
        form = self.operands.get(module, {}).get(operand)
        if form is None:
            return None
        name = f"{module}.{OPERANDS[operand]}"
        self.grids[name] = make_grid(Form.parse(form), self.tensors, name, shape)
        return self.grids[name]

    def vector(self, name: str, size: int) -> np.ndarray:
        """A float tensor of a known size.

        Raises:
            ValueError: If it is missing or of another size.
        """
        found = self.tensors.get(name)
        if found is None or found.size != size or found.dtype != np.float32:
            raise ValueError(f"tensor '{name}' should hold {size} floating-point values")
        return found.reshape(-1)

    def optional(self, name: str, size: int) -> np.ndarray | None:
        """The same; None where there is none."""
        return self.vector(name, size) if name in self.tensors else None


def _widened(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype == np.float16 else value


class Layer:
    """A layer with a weight.

    Args:
        parts: What it is made of.
        name: Its name.
        k: Width of its product.
        shape: Trailing shape of its input, where that is not (k,).
        arrange: Rearranges the input once it is on its grid, such as an image to patches.
    """

    def __init__(
        self,
        parts: Parts,
        name: str,
        k: int,
        shape: tuple[int, ...] | None = None,
        arrange: Callable[[np.ndarray], np.ndarray] = np.ascontiguousarray,
    ) -> None:
        self.name = name
        grid = parts.grid(name, "input", shape or (k,))
        self.product, self.num_outputs = _product(parts, name, k, grid, arrange)

    def __call__(self, x: np.ndarray, see: See) -> np.ndarray:
        """The output (..., outputs)."""
        see(f"{self.name}.{OPERANDS['input']}", x)
        return self.product(x)


def _product(
    parts: Parts, name: str, k: int, grid: Grid | None, arrange: Callable[[Any], Any]
) -> tuple[Multiply, int]:
    """How a layer multiplies, and the number of its outputs."""
    weight, run = parts.tensors.get(f"{name}.weight"), parts.operations
    text = parts.operands.get(name, {}).get("weight")
    if weight is None:
        raise ValueError(f"tensor '{name}.weight' is missing")
    num_outputs = len(weight)
    bias = parts.optional(f"{name}.bias", num_outputs)
    if text is None:
        if weight.dtype != np.float32 or weight.size != num_outputs * k:
            raise ValueError(f"tensor '{name}.weight' should hold {num_outputs} x {k} values")
        return _values(run, grid, weight.reshape(num_outputs, k), bias, arrange), num_outputs
    form = Form.parse(text)
    stored = Stored.read(parts, name, form, num_outputs, k)
    if form.kind == "b" and isinstance(grid, Sign) and arrange is np.ascontiguousarray:
        return _bits(run, grid, stored, k, bias), num_outputs
    if grid is None or grid.largest is None or form.bits > MOST_BITS:
        values = stored.steps() * stored.scale[:, None]
        return _values(run, grid, values, bias, arrange), num_outputs
    return _integers(run, grid, stored, bias, arrange), num_outputs


@dataclass(frozen=True)
class Stored:
    """A quantized weight as the file has it.

    Attributes:
        form: Its form.
        rows: Packed codes (outputs, bytes).
        k: Codes of a row.
        scale: Scale of each output.
        zero_point: Code of zero of each output, as codes count; None where it is in the middle.
    """

    form: Form
    rows: np.ndarray
    k: int
    scale: np.ndarray
    zero_point: np.ndarray | None

    @staticmethod
    def read(parts: Parts, name: str, form: Form, num_outputs: int, k: int) -> "Stored":
        """The weight of a layer.

        Raises:
            ValueError: If a tensor is missing or has another shape than the network demands.
        """
        below, tensors = f"{name}.{OPERANDS['weight']}", parts.tensors
        rows, scale = tensors[f"{name}.weight"], tensors.get(f"{below}.scale")
        if rows.dtype != np.uint8 or rows.shape != (num_outputs, row_bytes(k, form.bits)):
            raise ValueError(f"'{name}.weight' should hold {num_outputs} rows of {k} packed codes")
        if scale is None or scale.size not in (1, num_outputs) or scale.dtype != np.float32:
            raise ValueError(f"'{below}.scale' should hold a scale for each output")
        zero_point = tensors.get(f"{below}.zero_point")
        if zero_point is not None:
            if zero_point.shape != (1, row_bytes(scale.size, form.bits)):
                raise ValueError(f"'{below}.zero_point' should hold a code for each scale")
            zero_point = unpack_codes(zero_point, scale.size, form.bits)[0]
        return Stored(form, rows, k, np.resize(scale.reshape(-1), num_outputs), zero_point)

    def steps(self) -> np.ndarray:
        """Codes minus zero points, int32 (outputs, k)."""
        codes = unpack_codes(self.rows, self.k, self.form.bits).astype(np.int32)
        if self.form.kind == "b":
            return 2 * codes - 1
        if self.zero_point is None:
            return codes + self.form.low
        return codes - self.zero_point.astype(np.int32)[:, None]


def _bits(run: Operations, grid: Sign, stored: Stored, k: int, bias: np.ndarray | None) -> Multiply:
    """Signs times signs."""
    weight = run["prepare_binary"](words(stored.rows), k)
    threshold = np.ascontiguousarray(grid.fixed.reshape(1, k))

    def product(x: np.ndarray) -> np.ndarray:
        groups = np.ascontiguousarray(x).reshape(len(x), prod(x.shape[1:-1]), k)
        gain = grid.gain if x.ndim > 2 else None  # one row has no tokens to average
        signs = run["sign_pack"](groups, threshold, gain)
        out = run["binary_linear"](
            signs.reshape(-1, signs.shape[-1]), weight, k, stored.scale, bias
        )
        return out.reshape(*x.shape[:-1], out.shape[-1])

    return product


def _integers(
    run: Operations,
    grid: Grid,
    stored: Stored,
    bias: np.ndarray | None,
    arrange: Callable[[Any], Any],
) -> Multiply:
    """Steps times steps."""
    weight = run["prepare_integer"](stored.steps().astype(np.int16), grid.largest)

    def product(x: np.ndarray) -> np.ndarray:
        steps, scale = arrange(grid.steps(x)), grid.scale(x)
        rows = steps.reshape(-1, stored.k)
        if scale.ndim == 0:
            out = run["integer_linear"](rows, weight, scale * stored.scale, bias)
        else:
            out = run["integer_linear"](rows, weight, stored.scale, None) * scale.reshape(-1, 1)
            out = out if bias is None else out + bias
        return out.reshape(*steps.shape[:-1], out.shape[-1])

    return product


def _values(
    run: Operations,
    grid: Grid | None,
    weight: np.ndarray,
    bias: np.ndarray | None,
    arrange: Callable[[Any], Any],
) -> Multiply:
    """Values times values."""
    width = weight.shape[1]
    ready = run["prepare_linear"](np.ascontiguousarray(weight, np.float32))

    def product(x: np.ndarray) -> np.ndarray:
        values = arrange(x if grid is None else grid.values(x))
        out = run["linear"](np.ascontiguousarray(values).reshape(-1, width), ready, bias)
        return out.reshape(*values.shape[:-1], out.shape[-1])

    return product

"""Operators of ONNX, as functions that are called while torch traces a model for its export."""

from collections.abc import Mapping

import torch
from torch import Tensor

OPSET = 21
"""The first with integers of 4 and 16 bits."""
DOMAIN = "lowbit"
"""Of operators that `qat.export.graph` takes out again."""


def gathered(table: Tensor, index: Tensor) -> Tensor:
    """Values of a table at indices."""
    return operator("Gather", (table, index), index.shape, table.dtype)


def operator(
    name: str,
    inputs: tuple[Tensor, ...],
    shape: torch.Size,
    dtype: torch.dtype,
    attributes: Mapping[str, int | str] | None = None,
    version: int = OPSET,
) -> Tensor:
    """The output of an operator of ONNX, while a model is exported."""
    return torch.onnx.ops.symbolic(
        name, inputs, dict(attributes or {}), dtype=dtype, shape=shape, version=version
    )


def dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int = 0) -> Tensor:
    """Values of codes, whose scale is a number, or has one for each index of an axis."""
    attributes = {"axis": axis} if scale.ndim else {}
    operands = (codes, scale, zero_point)
    return operator("DequantizeLinear", operands, codes.shape, scale.dtype, attributes)


def requantized(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values on a grid of the type of its zero point."""
    operands = (x, scale, zero_point)
    codes = operator("QuantizeLinear", operands, x.shape, zero_point.dtype)
    return dequantized(codes, scale, zero_point)


def marked(x: Tensor, name: str, side: str) -> Tensor:
    """The tensor, known as the input or the output of a grid."""
    said = {"grid": name, "side": side}
    return operator(f"{DOMAIN}::Mark", (x,), x.shape, x.dtype, said, version=1)


def kept(codes: Tensor) -> Tensor:
    """Integers of which the exporter does not compute in advance what follows."""
    return operator(f"{DOMAIN}::Kept", (codes,), codes.shape, codes.dtype, version=1)

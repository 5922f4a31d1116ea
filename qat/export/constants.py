"""Weights, as an ONNX file holds them: integers where their grid has equal steps."""

import torch
from torch import Tensor, nn

from qat.export.operators import dequantized, marked
from qat.quantizers import Codes, Phase, Quantizer


class Weight(nn.Module):
    """A weight of constant values. A matrix is kept as its transpose, as MatMul takes it.

    Args:
        name: Name of the quantizer.
        quantizer: The quantizer.
        weight: The weight (out_features, ...).
    """

    phase = Phase.QUANTIZE

    def __init__(self, name: str, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__()
        self.name, self.shape = name, weight.shape
        self.transposed = weight.ndim == 2
        self.grid = _constant(quantizer, weight, self.transposed)

    def forward(self, _: Tensor) -> Tensor:
        """The quantized weight."""
        values = marked(self.grid(), self.name, "output")
        return values.T if self.transposed else values


def _constant(quantizer: Quantizer, weight: Tensor, transposed: bool) -> nn.Module:
    try:
        codes = quantizer.codes(weight)
    except ValueError:  # a zero point that is a fraction
        return Values(quantizer.fake_quantize(weight), transposed)
    if codes.table is not None:
        return RowTables(codes, transposed)
    return Integers(codes, transposed)


class Values(nn.Module):
    """Numbers as they are."""

    values: Tensor

    def __init__(self, values: Tensor, transposed: bool) -> None:
        super().__init__()
        self.register_buffer("values", _laid(values.detach(), transposed))

    def forward(self) -> Tensor:
        """The numbers."""
        return self.values


class Integers(nn.Module):
    """Integers with a scale for all, or for each index of one axis.

    Args:
        codes: Codes of a weight.
        transposed: Whether to keep the transpose.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, codes: Codes, transposed: bool) -> None:
        super().__init__()
        values, zero_point = _within_one_type(codes)
        scale = codes.scale.detach()
        axes = [axis for axis, size in enumerate(scale.shape) if size > 1] or [0]
        axis = values.ndim - scale.ndim + axes[0]
        self.axis = values.ndim - 1 - axis if transposed else axis
        shape = (-1,) if scale.numel() > 1 else ()
        self.register_buffer("codes", _laid(values, transposed))
        self.register_buffer("scale", scale.reshape(shape))
        self.register_buffer("zero_point", zero_point.expand_as(scale).reshape(shape))

    def forward(self) -> Tensor:
        """Their values."""
        return dequantized(self.codes, self.scale, self.zero_point, self.axis)


def _within_one_type(codes: Codes) -> tuple[Tensor, Tensor]:
    """Codes and zero point in one integer type; from zero where the zero point is no code."""
    values = codes.values
    if codes.zero_point is None:
        return values, torch.zeros_like(codes.scale, dtype=values.dtype)
    zero_point = codes.zero_point.detach()
    info = torch.iinfo(values.dtype)
    within = info.min <= zero_point.min() and zero_point.max() <= info.max
    if within and values.dtype is not torch.int32:  # of which ONNX wants the zero point to be zero
        return values, zero_point.to(values.dtype)
    return (values - zero_point).to(torch.int32), torch.zeros_like(zero_point, dtype=torch.int32)


class RowTables(nn.Module):
    """Values of a table, one for each row or one for all.

    Args:
        codes: Codes of a weight, with a table.
        transposed: Whether to keep the transpose.
    """

    codes: Tensor
    table: Tensor

    def __init__(self, codes: Codes, transposed: bool) -> None:
        super().__init__()
        assert codes.table is not None
        self.transposed, self.shape = transposed, codes.values.shape
        self.register_buffer("codes", codes.values.flatten(1))
        rows = (len(codes.values), codes.table.shape[-1])
        self.register_buffer("table", codes.table.detach().expand(rows).contiguous())

    def forward(self) -> Tensor:
        """The values."""
        return _laid(self.table.gather(1, self.codes.long()).reshape(self.shape), self.transposed)


def _laid(values: Tensor, transposed: bool) -> Tensor:
    return values.T.contiguous() if transposed else values

"""Weights, as an ONNX file holds them: integers where their grid has equal steps."""

import torch
from torch import Tensor, nn

from qat.export.operators import dequantized, kept, marked
from qat.quantizers import Codes, Phase, Quantizer


class Weight(nn.Module):
    """A weight of constant values. A matrix is kept as its transpose, as MatMul takes it.

    Args:
        name: Name of the quantizer.
        quantizer: The quantizer.
        weight: The weight (out_features, ...).
        by_integers: Whether what it is multiplied by is of integers too.
    """

    phase = Phase.QUANTIZE

    def __init__(self, name: str, quantizer: Quantizer, weight: Tensor, by_integers: bool) -> None:
        super().__init__()
        self.name, self.transposed = name, weight.ndim == 2
        self.grid = _constant(quantizer, weight, self.transposed, by_integers)

    def forward(self, _: Tensor) -> Tensor:
        """The quantized weight."""
        values = marked(self.grid(), self.name, "output")
        return values.T if self.transposed else values


def _constant(
    quantizer: Quantizer, weight: Tensor, transposed: bool, by_integers: bool
) -> nn.Module:
    try:
        codes = quantizer.codes(weight)
    except ValueError:  # a zero point that is a fraction
        return Values(quantizer.fake_quantize(weight), transposed)
    if codes.table is not None:
        return RowTables(codes, transposed)
    return Integers(codes, transposed, by_integers)


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

    Their values are by DequantizeLinear where they meet integers. Where they meet floating-point
    numbers it would have ONNX Runtime round those as well (MatMulNBits), so there the same is
    written as arithmetic, which a runtime does once, when it loads the file.

    Args:
        codes: Codes of a weight.
        transposed: Whether to keep the transpose.
        by_integers: Whether they meet integers.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, codes: Codes, transposed: bool, by_integers: bool) -> None:
        super().__init__()
        self.by_integers = by_integers
        values, zero_point = _within_one_type(codes)
        scale = codes.scale.detach()
        sizes = (1,) * (values.ndim - scale.ndim) + tuple(scale.shape)
        axis = next((axis for axis, size in enumerate(sizes) if size > 1), 0)
        self.axis = values.ndim - 1 - axis if transposed else axis
        shape = (-1,) if scale.numel() > 1 else ()
        self.register_buffer("codes", _laid(values, transposed))
        self.register_buffer("scale", scale.reshape(shape))
        self.register_buffer("zero_point", zero_point.expand_as(scale).reshape(shape))

    def forward(self) -> Tensor:
        """Their values."""
        if self.by_integers:
            return dequantized(self.codes, self.scale, self.zero_point, self.axis)
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        scale, zero_point = self.scale.reshape(shape), self.zero_point.reshape(shape)
        return (kept(self.codes).to(scale.dtype) - zero_point.to(scale.dtype)) * scale


def _within_one_type(codes: Codes) -> tuple[Tensor, Tensor]:
    """Codes and zero point in one integer type; from zero where the zero point is no code."""
    values = codes.values
    if codes.zero_point is None:
        return values, torch.zeros_like(codes.scale, dtype=values.dtype)
    zero_point = codes.zero_point.detach()
    if all(int(x.min()) >= 0 and int(x.max()) <= 255 for x in (values, zero_point)):
        return values.to(torch.uint8), zero_point.to(torch.uint8)
    return (values - zero_point).int(), torch.zeros_like(zero_point).int()


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
        values = self.table.gather(1, kept(self.codes).long())
        return _laid(values.reshape(self.shape), self.transposed)


def _laid(values: Tensor, transposed: bool) -> Tensor:
    return values.T.contiguous() if transposed else values

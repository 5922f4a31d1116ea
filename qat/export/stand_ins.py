"""What stands in for the quantizers of a model while it is exported to ONNX.

    weights       integers and DequantizeLinear; a table of values for grids of unequal steps
    equal steps   Clip where codes have fewer bits than 8 or 16, QuantizeLinear, DequantizeLinear
    tables        a binary search among the bounds, and Gather
    signs         the quantizer's own arithmetic, then integers of step 1
    others        the quantizer's own arithmetic

All of them compute what the quantizer computes, bit for bit, as far as the arithmetic of ONNX is
that of torch. What goes in and comes out is marked by an operator that `qat.export.graph` takes out
again, so that every grid can be found in the file.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qat.export.constants import Weight
from qat.export.operators import gathered, marked, operator, requantized
from qat.export.tables import bounds_and_levels
from qat.packed.network import Form
from qat.quantizers import Companding, Phase, Quantizer, quantizers
from qat.spec import Operand


def replace_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put stand-ins in the places of a model's quantizers.

    Args:
        model: The model, calibrated.
        weights: What each quantizer of a weight is given, by its name.
    """
    found = list(quantizers(model))
    for name, quantizer in found:
        if quantizer.operand is not Operand.WEIGHT:
            model.set_submodule(name, Marked(name, _activation(quantizer)))
    for name, quantizer in found:
        if name in weights:
            owner = model.get_submodule(name.rpartition(".")[0])
            by_integers = _is_of_bytes(getattr(owner, "input_quantizer", None))
            model.set_submodule(name, Weight(name, quantizer, weights[name], by_integers))


def _is_of_bytes(module: object) -> bool:
    """Whether what a stand-in gives are integers of 8 bits."""
    grid = module.grid if isinstance(module, Marked) else None
    return isinstance(grid, Uniform | Signs) and grid.zero_point.dtype is torch.uint8


def _activation(quantizer: Quantizer) -> nn.Module:
    if isinstance(quantizer, Companding):
        return Table(quantizer)
    kind = None if quantizer.packed_form is None else Form.parse(quantizer.packed_form).kind
    if kind in ("s", "u", "map") and (grid := _uniform(quantizer)) is not None:
        return grid
    return Signs(quantizer) if kind and kind.startswith("sign") else quantizer


def _uniform(quantizer: Quantizer) -> "Uniform | None":
    """Its grid; None where no runtime would take it for one.

    That is a zero point that is no code, so that no integer type holds it, and a scale for each
    channel of an activation, over which ONNX Runtime stumbles when it fuses the product.
    """
    spec = quantizer.spec
    try:
        codes = quantizer.codes(torch.zeros(quantizer.shape))
    except ValueError:  # a zero point that is a fraction
        return None
    low, high = (spec.qmin, spec.qmax) if spec.bits > 1 else (0, 1)
    zero_point = torch.zeros(()) if codes.zero_point is None else codes.zero_point
    if codes.scale.numel() > 1 or not low <= zero_point.item() <= high:
        return None
    return Uniform(codes.scale.detach(), zero_point.detach(), low, high)


class Marked(nn.Module):
    """Says where the input and the output of a grid are.

    Args:
        name: Name of the quantizer.
        grid: What computes.
    """

    phase = Phase.QUANTIZE

    def __init__(self, name: str, grid: nn.Module) -> None:
        super().__init__()
        self.name, self.grid = name, grid

    def forward(self, x: Tensor) -> Tensor:
        """The grid's values."""
        return marked(self.grid(marked(x, self.name, "input")), self.name, "output")


class Uniform(nn.Module):
    """Equal steps, codes counted from zero: runtimes know more kernels for unsigned activations.

    Args:
        scale: Size of a step.
        zero_point: Code of the value zero.
        qmin: Smallest code.
        qmax: Largest code.
    """

    scale: Tensor
    zero_point: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> None:
        super().__init__()
        bits = (qmax - qmin).bit_length()
        self.clips = bits not in (8, 16)
        scale, shifted = scale.reshape(()), zero_point.reshape(()) - qmin
        dtype = torch.uint8 if bits <= 8 else torch.uint16
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", shifted.to(dtype))
        self.register_buffer("lowest", -shifted * scale)
        self.register_buffer("highest", (qmax - qmin - shifted) * scale)

    def forward(self, x: Tensor) -> Tensor:
        """The nearest value of the grid."""
        if self.clips:
            x = operator("Clip", (x, self.lowest, self.highest), x.shape, x.dtype)
        return requantized(x, self.scale, self.zero_point)


class Table(nn.Module):
    """The level between whose bounds a value lies, found in as many steps as codes have bits.

    Args:
        quantizer: A quantizer of [0, scale].
    """

    scale: Tensor
    bounds: Tensor
    levels: Tensor

    def __init__(self, quantizer: Companding) -> None:
        super().__init__()
        bounds, levels = (torch.from_numpy(part) for part in bounds_and_levels(quantizer))
        levels = levels.flip(0) if levels[0] > levels[-1] else levels
        self.depth = math.ceil(math.log2(len(levels)))
        fill = bounds.new_full((2**self.depth - 1 - len(bounds),), math.inf)
        self.register_buffer("scale", quantizer.scale.detach())
        self.register_buffer("bounds", torch.cat([bounds, fill]))
        self.register_buffer("levels", levels * quantizer.scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        """The levels."""
        u = (x / self.scale).clamp(0, 1)
        index = torch.zeros_like(x, dtype=torch.int64)
        for step in (2**power for power in reversed(range(self.depth))):
            index = index + step * (u >= gathered(self.bounds, index + (step - 1))).long()
        return gathered(self.levels, index)


class Signs(nn.Module):
    """Signs as integers of step 1, so that products of signs can run on integers.

    Args:
        quantizer: The quantizer, which gives -1 and +1.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.ones((), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """The signs."""
        return requantized(self.quantizer(x), self.scale, self.zero_point)

"""The life cycle every quantizer shares: float, observe, quantize.

The phase is moved by the caller, never by data; it is part of the checkpoint; and every tensor of
state exists, with its final shape, when the constructor returns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import reduce
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from qat.ops import dequantize, look_up
from qat.spec import Operand, QuantSpec


class Phase(StrEnum):
    """What `Quantizer.forward` does."""

    FLOAT = "float"
    OBSERVE = "observe"
    QUANTIZE = "quantize"


@dataclass(frozen=True)
class Codes:
    """Integer codes of a tensor, with all it takes to map them back.

    Attributes:
        values: Codes, of the smallest integer type that holds the grid, in the tensor's shape.
        scale: Size of one step; broadcasts against `values`.
        zero_point: Code of the real value zero; None for a symmetric grid.
        table: Real value of each code, for a grid whose steps differ; then `scale` is its largest
            value and there is no zero point. One row for all values, or (rows, codes) for a table
            for each index of the first axis.
        dtype: That of the tensor, which `Quantizer.dequantize` gives back.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    table: Tensor | None = None
    dtype: torch.dtype = torch.float32

    def wide(self, dtype: torch.dtype) -> "Codes":
        """The codes of a tensor of a dtype, mapped back in its arithmetic: of 32 bits or more."""
        parts = {"scale": self.scale, "zero_point": self.zero_point, "table": self.table}
        kept = {name: _wide(part, dtype) for name, part in parts.items() if part is not None}
        return replace(self, **kept, dtype=dtype)


class Quantizer(nn.Module, ABC):
    """Maps a tensor onto a grid: FLOAT passes it, OBSERVE also collects, QUANTIZE maps.

    Args:
        spec: Bits, sign and granularity.
        shape: Trailing shape of the operand, with 1 where its size varies (tokens, pixels).
        operand: Role of the tensor in its product.

    Raises:
        ValueError: If the class offers no grid of `spec.bits` bits.
    """

    supported_bits: ClassVar[range] = range(2, 17)
    has_zero_point: ClassVar[bool] = True
    """Whether an unsigned grid may be moved to where the values are; says what `w4a4` means."""
    steps_are_magnitudes: ClassVar[bool] = False
    """Whether the steps of the grid are |scale|, which training may lead through zero."""

    def __init__(
        self, spec: QuantSpec, shape: tuple[int, ...], operand: Operand = Operand.INPUT
    ) -> None:
        super().__init__()
        if spec.bits not in self.supported_bits:
            low, high = self.supported_bits[0], self.supported_bits[-1]
            offer = f"{low}" if low == high else f"{low} to {high}"
            other = (
                "binaryvit.BinaryQuantizers" if spec.bits == 1 else "qat.quantizers.LSQ (2 to 16)"
            )
            raise ValueError(
                f"{type(self).__name__} offers {offer} bits, got {spec.bits} for the {operand}; "
                f"change the plan, or use {other}"
            )
        self.spec = spec
        self.shape = shape
        self.operand = operand
        self.phase = Phase.FLOAT

    @property
    def num_extra_scales(self) -> int:
        """Numbers that define the grid beside scale and zero point; costs count 32 bits each."""
        return 0

    @property
    def mean_bits(self) -> int | float:
        """Mean width of the codes of an operand, for its cost."""
        return self.spec.bits

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Accumulate statistics of `x`, without gradient."""

    @abstractmethod
    def freeze(self) -> None:
        """Turn statistics into parameters; RuntimeError where there are none."""

    @abstractmethod
    def forget(self) -> None:
        """Drop the statistics."""

    @abstractmethod
    def fake_quantize(self, x: Tensor) -> Tensor:
        """Values of `x` on the grid, differentiable by the quantizer's surrogate gradient."""

    @abstractmethod
    def encode(self, x: Tensor) -> Codes:
        """Integer codes of `x`, as `codes` but of values that are wide and without gradient."""

    @final
    def codes(self, x: Tensor) -> Codes:
        """Integer codes of `x`; `dequantize(codes(x))` equals the quantized `x` bit for bit."""
        return self.encode(_wide(x.detach())).wide(x.dtype)

    @final
    def dequantize(self, codes: Codes) -> Tensor:
        """Real values of integer codes, in the dtype of what they are of."""
        return self.decode(codes).to(codes.dtype)

    def decode(self, codes: Codes) -> Tensor:
        """Real values of integer codes. Grids of another form override this."""
        if codes.table is not None:
            return look_up(codes.values, codes.table)
        return dequantize(codes.values.to(codes.scale.dtype), codes.scale, codes.zero_point)

    def boundary_distance(self, x: Tensor) -> Tensor:
        """Distance of each value to where its code would change, in steps of the grid."""
        raise NotImplementedError(f"{type(self).__name__} has no boundary distance")

    @property
    def packed_form(self) -> str | None:
        """Name of its form in a packed file (`qat.packed.network`); None where it has none."""
        return None

    def restore(self, codes: Codes) -> Tensor:
        """Take the grid of a weight's codes, and give a weight whose codes these are.

        Raises:
            ValueError: If the quantizer finds its grid in no codes.
        """
        raise ValueError(f"{type(self).__name__} cannot be restored from codes")

    @final
    def forward(self, x: Tensor) -> Tensor:
        """Pass, observe or quantize, by phase. Arithmetic has at least 32 bits, autocast or not."""
        match self.phase:
            case Phase.FLOAT:
                return x
            case Phase.OBSERVE:
                self._require_finite(x)
                self.observe(_wide(x.detach()))
                return x
            case Phase.QUANTIZE:
                return self.fake_quantize(_wide(x)).to(x.dtype)

    def _require_finite(self, x: Tensor) -> None:
        lowest, highest = x.aminmax()  # NaN where any value is
        if not (torch.isfinite(lowest) and torch.isfinite(highest)):
            raise ValueError(
                f"calibration leads to values of the {self.operand} that are NaN or infinite; "
                "check the images, the preprocessing and the float model on them"
            )

    def get_extra_state(self) -> dict[str, str]:
        """The phase, a Python value so that no forward has to read a tensor."""
        return {"phase": self.phase.value}

    def set_extra_state(self, state: Any) -> None:  # whatever a stranger put there
        """Restore the phase from a checkpoint.

        Raises:
            ValueError: If there is no such phase.
        """
        if not (isinstance(state, dict) and state.get("phase") in list(Phase)):
            raise ValueError(f"a quantizer's phase is one of {', '.join(Phase)}, got {state!r:.80}")
        self.phase = Phase(state["phase"])

    def require_usable(self) -> None:
        """Refuse a state that is no grid: numbers that are not finite, steps that are not positive.

        Raises:
            ValueError: Naming the tensor.
        """
        for name, value in self.state_dict().items():
            if not isinstance(value, Tensor):
                continue
            if not value.isfinite().all():
                raise ValueError(f"{name} holds values that are not finite")
            steps = value.abs() if self.steps_are_magnitudes else value
            if name == "scale" and not (steps > 0).all():
                raise ValueError("scale holds values that are not positive")

    def extra_repr(self) -> str:
        """Operand, spec and phase."""
        sign = "signed" if self.spec.signed else "unsigned"
        return f"{self.operand}, {self.spec.bits} bit {sign}, {self.spec.granularity}, {self.phase}"


def _wide(x: Tensor, other: torch.dtype = torch.float32) -> Tensor:
    """`x` with at least 32 bits, and at least those of another dtype."""
    return x.to(reduce(torch.promote_types, (x.dtype, other, torch.float32)))


QuantizerFactory = Callable[[QuantSpec, tuple[int, ...], Operand], Quantizer]
"""What `convert_` calls for each operand: a quantizer class, a `partial` of one, or a `Factory`.
A checkpoint stores it by name and arguments."""


class Factory(ABC):
    """A factory that dispatches on the operand; subclasses are frozen dataclasses."""

    @abstractmethod
    def __call__(self, spec: QuantSpec, shape: tuple[int, ...], operand: Operand) -> Quantizer:
        """The quantizer of one operand."""


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Names and quantizers of a model, in the order of its modules."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module


def set_phase(model: nn.Module, phase: Phase) -> None:
    """Move every quantizer of a model to `phase`."""
    for _, quantizer in quantizers(model):
        quantizer.phase = phase

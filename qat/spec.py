"""What a quantizer is asked for: bits, sign and granularity of one operand.

A `QuantSpec` is a value: frozen, hashable, equal by content. It says nothing about how the scale
is found; that is the quantizer's business.
"""

from dataclasses import dataclass
from enum import StrEnum


class Granularity(StrEnum):
    """How many scales an operand has."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"


class Operand(StrEnum):
    """The role of a tensor in a matrix product; quantizer factories dispatch on it."""

    WEIGHT = "weight"
    INPUT = "input"
    QUERY = "query"
    KEY = "key"
    ATTENTION = "attention"
    VALUE = "value"
    LEFT = "left"
    RIGHT = "right"


@dataclass(frozen=True)
class QuantSpec:
    """Bit width, sign and granularity of one operand.

    Attributes:
        bits: Width of a code, 1 to 16. Width 1 is binary, {-1, +1} or {0, 1}: it has no integer
            grid, because a one-bit two's complement grid would be {-1, 0}; sign and granularity
            then follow from the operand.
        signed: True for a grid symmetric around zero, without zero point; False for codes
            {0 .. 2^bits - 1}, with a zero point where the quantizer has one.
        granularity: One scale for the tensor, or one per index of the first axis of its trailing
            shape: output channels of a weight, features of a linear input, heads of an attention
            operand.

    Raises:
        ValueError: If `bits` is outside 1 to 16.
    """

    bits: int
    signed: bool = True
    granularity: Granularity = Granularity.PER_TENSOR

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise ValueError(
                f"QuantSpec.bits must be 1 to 16, got {self.bits}; "
                "for an operand that stays in float, leave its spec out of the rule"
            )

    @property
    def qmin(self) -> int:
        """Smallest code of the integer grid."""
        self._require_integer_grid()
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code of the integer grid."""
        self._require_integer_grid()
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of an operand whose trailing shape is `shape`.

        Example:
            >>> QuantSpec(4, granularity=Granularity.PER_CHANNEL).scale_shape((64, 3, 2, 2))
            (64, 1, 1, 1)
        """
        if self.granularity is Granularity.PER_TENSOR:
            return ()
        return (shape[0], *(1 for _ in shape[1:]))

    def _require_integer_grid(self) -> None:
        if self.bits == 1:
            raise ValueError(
                "1 bit has no integer grid; use a binary quantizer (binaryvit.BinaryQuantizers)"
            )

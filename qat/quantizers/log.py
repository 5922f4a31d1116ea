"""Logarithmic quantization of attention maps: base 2 and base sqrt 2.

    codes   c = clip(round(-k log2(x / s)), 0, 2^b - 1)
    output  s 2^(-c / k),  k = 1 for base 2, k = 2 for base sqrt 2
    start   s, of the quantiles 0.999, 0.9999 and 0.99999, the one of least squared error

Symbols: s = `scale`, b = bits, k = `codes_per_octave`. Odd codes of base sqrt 2 are powers of two
times sqrt 2, so an integer kernel shifts, and multiplies half of the values by one constant
(RepQ-ViT, Li et al., ICCV 2023, https://arxiv.org/abs/2212.08254, its scale reparameterization).
Values below the smallest power are what `zero` decides; the difference is large at 3 and 4 bits.
Provenance: RepQ-ViT's official code for the search and for `extra`; its paper, in the words of a
secondary source, for `none`.
"""

import math
from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from qat import ops
from qat.quantizers.companding import Companding
from qat.quantizers.observers import in_parts
from qat.quantizers.percentile_mse import upper_quantiles
from qat.spec import Operand, QuantSpec

FRACTIONS = (0.999, 0.9999, 0.99999)


ZERO_CODES = ("none", "extra", "last")
"""What becomes of values below the smallest power.

    none    they are raised to it: 2^b powers, no zero (RepQ-ViT, paper)
    extra   they become zero, by a code more than b bits hold (RepQ-ViT, code)
    last    they become zero, by the last of the 2^b codes: a true b-bit format
"""


def log_levels(num_powers: int, codes_per_octave: int, zero: bool) -> Float[Tensor, " codes"]:
    """Powers `2^(-c / k)` for c = 0 .. num_powers - 1, then zero if asked for.

    Example:
        >>> log_levels(3, 2, zero=True)
        tensor([1.0000, 0.7071, 0.5000, 0.0000], dtype=torch.float64)
    """
    powers = [2 ** (-code / codes_per_octave) for code in range(num_powers)]
    return torch.tensor([*powers, *([0.0] if zero else [])], dtype=torch.float64)


class Log(Companding):
    """Powers of a root of two times the scale; subclasses say of which.

    Args:
        spec: Bits.
        shape: Trailing shape of the operand.
        operand: Role of the tensor in its product.
        zero: What becomes of values below the smallest power.
        learn_scale: Train the scale.
    """

    count: Tensor
    error: Tensor
    candidates: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...],
        operand: Operand = Operand.ATTENTION,
        *,
        zero: str = "extra",
        learn_scale: bool = False,
    ) -> None:
        super().__init__(spec, shape, operand, learn_scale=learn_scale)
        if zero not in ZERO_CODES:
            raise ValueError(f"zero must be one of {', '.join(ZERO_CODES)}, got '{zero}'")
        self.zero = zero
        self.register_buffer("count", torch.zeros((), dtype=torch.long), persistent=False)
        self.register_buffer("error", torch.zeros(len(FRACTIONS)), persistent=False)
        self.register_buffer("candidates", torch.ones(len(FRACTIONS)), persistent=False)

    @property
    @abstractmethod
    def codes_per_octave(self) -> int:
        """Codes from one power of two to the next."""

    @property
    def num_codes(self) -> int:
        """Number of levels, zero included."""
        return 2**self.spec.bits + (self.zero == "extra")

    def levels(self) -> Tensor:
        """Descending powers, then zero where there is one."""
        zero = self.zero != "none"
        return log_levels(self.num_codes - zero, self.codes_per_octave, zero).to(self.scale)

    def compress(self, u: Tensor) -> Tensor:
        """Distance below the scale, in codes."""
        return u.log2_().mul_(-self.codes_per_octave)

    def observe(self, x: Tensor) -> None:
        """Add the error of every candidate scale; the first batch fixes the candidates."""
        values = x.reshape(1, -1)
        if not self.count:
            found = upper_quantiles(values, FRACTIONS)[:, 0]
            self.candidates.copy_(torch.where(found > 0, found, 1.0))
        levels = self.levels()
        for part, scratch in in_parts(values):
            position = self.compress(part.clamp(min=0))  # once for all candidates
            for i, scale in enumerate(self.candidates):
                codes = torch.sub(position, self.compress(scale.clone()), out=scratch).round_()
                quantized = ops.look_up(codes.clamp_(0, self.num_codes - 1), levels * scale)
                self.error[i] += quantized.sub_(part).square_().sum()
        self.count += 1

    def freeze(self) -> None:
        """The candidate of least error."""
        if not self.count:
            raise RuntimeError("no batch was observed; calibrate with at least one batch")
        with torch.no_grad():
            self.scale.copy_(self.candidates[self.error.argmin()])

    def forget(self) -> None:
        """Drop the errors."""
        self.count.zero_()
        self.error.zero_()

    def boundary_distance(self, x: Tensor) -> Tensor:
        """Distance to the nearest rounding boundary, in codes."""
        u = (x.detach() / self.scale.detach()).clamp_(math.ulp(0.0), 1)
        return ops.boundary_distance(self.compress(u))


class Log2(Log):
    """Powers of two times the scale."""

    @property
    def codes_per_octave(self) -> int:
        """One."""
        return 1


class LogSqrt2(Log):
    """Powers of the square root of two times the scale."""

    @property
    def codes_per_octave(self) -> int:
        """Two."""
        return 2

"""Grids of [0, s] whose steps differ in size: what log and tangent quantizers share.

    codes   c = clip(round(f(clip(x / s, 0, 1))), 0, C - 1)
    output  s * level[c]

Symbols: s = `scale`, f = `compress`, level = `levels()`, C = `num_codes`. Inference needs no f^-1:
the output is a look-up in a table of C values, which `Codes.table` carries.
"""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat import ops
from qat.quantizers.base import Codes, Quantizer
from qat.spec import Granularity, Operand, QuantSpec


class Companding(Quantizer):
    """Quantizer of values that are never negative, above all of attention maps.

    Args:
        spec: Bits; the grid is unsigned and has one scale.
        shape: Trailing shape of the operand.
        operand: Role of the tensor in its product.
        learn_scale: Train the scale, with the gradient of LSQ.

    Raises:
        ValueError: If the spec asks for a signed grid or for more than one scale.
    """

    supported_bits = range(2, 9)

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...],
        operand: Operand = Operand.ATTENTION,
        *,
        learn_scale: bool = False,
    ) -> None:
        super().__init__(spec, shape, operand)
        if spec.signed or spec.granularity is not Granularity.PER_TENSOR:
            raise ValueError(
                f"{type(self).__name__} quantizes values in [0, scale] with one scale; give the "
                f"{operand} the spec {{bits: {spec.bits}, signed: false}}"
            )
        self.scale = nn.Parameter(torch.ones(()), requires_grad=learn_scale)
        self.grad_factor = 1 / (shape[0] * spec.qmax) ** 0.5

    @property
    def num_codes(self) -> int:
        """Number of levels."""
        return 2**self.spec.bits

    @property
    def packed_form(self) -> str:
        """Bounds and levels."""
        return f"table{self.spec.bits}"

    @abstractmethod
    def compress(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Position of values in [0, 1] on the scale of codes, not rounded; may modify `u`."""

    @abstractmethod
    def levels(self) -> Float[Tensor, " codes"]:
        """Value of each code in units of the scale."""

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The level of the code of each value."""
        scale = self.scale
        return ops.table_quantize(x, scale, self._codes(x), self.levels(), self.grad_factor)

    def encode(self, x: Tensor) -> Codes:
        """Codes of `x` and the table of their values."""
        scale = self.scale.detach()
        values = self._codes(x).to(ops.code_dtype(0, self.num_codes - 1))
        return Codes(values, scale, table=self.levels() * scale)

    @torch.no_grad()
    def _codes(self, x: Tensor) -> Tensor:
        u = (x / self.scale).clamp_(0, 1)
        return self.compress(u).round_().clamp_(0, self.num_codes - 1)

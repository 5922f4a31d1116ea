"""Dynamic quantization of activations: every token finds its own scale when it arrives.

    scale   s = max |x| / qmax over the features of a token
    codes   c = clip(round(x / s), qmin, qmax)

Nothing is calibrated and nothing is stored. Source: what LRQ-DiT's code and ViDiT-Q use for every
input; textbook.
"""

import torch
from torch import Tensor

from qat import ops
from qat.quantizers.base import Codes, Quantizer
from qat.spec import Granularity, Operand, QuantSpec


class DynamicToken(Quantizer):
    """Symmetric, one scale for each token, from the token itself.

    Args:
        spec: Bits; signed, one scale (for each token).
        shape: Trailing shape of the operand.
        operand: Role of the tensor in its product.

    Raises:
        ValueError: If the spec is unsigned or asks for a scale for each channel, or the operand
            has no features on its last axis.
    """

    def __init__(
        self, spec: QuantSpec, shape: tuple[int, ...], operand: Operand = Operand.INPUT
    ) -> None:
        super().__init__(spec, shape, operand)
        if not spec.signed or spec.granularity is not Granularity.PER_TENSOR:
            raise ValueError(
                f"DynamicToken has one scale a token, around zero; give the {operand} the spec "
                f"{{bits: {spec.bits}}}"
            )
        if shape[-1] == 1:
            raise ValueError(
                f"DynamicToken needs features on the last axis of the {operand}, which has the "
                f"trailing shape {shape}; use Affine for images and attention maps"
            )

    def observe(self, x: Tensor) -> None:
        """Nothing is learned from data."""

    def freeze(self) -> None:
        """Nothing is stored."""

    def forget(self) -> None:
        """Nothing was kept."""

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Nearest value of each token's grid; nothing is clipped, so all of the gradient passes."""
        scale, spec = self._scale(x), self.spec
        codes = ops.quantize(x.detach(), scale, None, spec.qmin, spec.qmax)
        return ops.straight_through(x, codes.mul_(scale))

    def encode(self, x: Tensor) -> Codes:
        """Codes, and the scale of each token."""
        scale = self._scale(x)
        values = ops.quantize(x, scale, None, self.spec.qmin, self.spec.qmax)
        return Codes(values.to(ops.code_dtype(self.spec.qmin, self.spec.qmax)), scale)

    @property
    def packed_form(self) -> str:
        """Equal steps, a scale for each token."""
        return f"token{self.spec.bits}"

    def boundary_distance(self, x: Tensor) -> Tensor:
        """Distance to the nearest rounding boundary, in steps."""
        return ops.boundary_distance(x.detach() / self._scale(x))

    @torch.no_grad()
    def _scale(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True)
        return torch.where(largest > 0, largest / self.spec.qmax, 1.0)

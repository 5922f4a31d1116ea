"""Uniform affine quantization with statistics-derived scale and zero point: the baseline.

    codes   c = round(clip(x / s + z, qmin, qmax))
    output  (c - z) * s
    start   s, z cover the range that the observer chose

Symbols: s = `scale`, z = `zero_point`. A signed spec is symmetric, z = 0.
Provenance: textbook; Jacob et al., CVPR 2018, https://arxiv.org/abs/1712.05877.
"""

import torch
from torch import Tensor

from qat import ops
from qat.quantizers.base import Codes, Quantizer
from qat.quantizers.observers import MinMax, ObserverFactory, scale_of_range
from qat.spec import Operand, QuantSpec


class Affine(Quantizer):
    """Fixed scale and zero point, set once from statistics; the gradient passes straight through.

    Args:
        spec: Bits, sign and granularity.
        shape: Trailing shape of the operand.
        operand: Role of the tensor in its product.
        observer: Statistics that choose the clipping range.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...],
        operand: Operand = Operand.INPUT,
        *,
        observer: ObserverFactory = MinMax,
    ) -> None:
        super().__init__(spec, shape, operand)
        self.observer = observer(spec, shape)
        self.register_buffer("scale", torch.ones(spec.scale_shape(shape)))
        self.register_buffer("zero_point", torch.zeros(spec.scale_shape(shape)))

    def observe(self, x: Tensor) -> None:
        """Show a batch to the observer."""
        self.observer.observe(x)

    def forget(self) -> None:
        """Reset the observer."""
        self.observer.reset()

    def freeze(self) -> None:
        """Scale and zero point from the observed range."""
        scale, zero_point = scale_of_range(*self.observer.range(), self.spec)
        self.scale.copy_(scale)
        if zero_point is not None:
            self.zero_point.copy_(zero_point)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Nearest value of the grid."""
        spec = self.spec
        return ops.fake_quantize(x, self.scale, self._offset(), spec.qmin, spec.qmax)

    def codes(self, x: Tensor) -> Codes:
        """Codes of `x` with scale and zero point."""
        spec = self.spec
        values = ops.quantize(x.detach(), self.scale, self._offset(), spec.qmin, spec.qmax)
        return Codes(values.to(ops.code_dtype(spec.qmin, spec.qmax)), self.scale, self._offset())

    def boundary_distance(self, x: Tensor) -> Tensor:
        """Distance to the nearest rounding boundary, in steps."""
        return ops.boundary_distance(ops.to_grid_units(x.detach(), self.scale, self._offset()))

    def _offset(self) -> Tensor | None:
        return None if self.spec.signed else self.zero_point

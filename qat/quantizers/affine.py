"""Uniform affine quantization with statistics-derived scale and zero point: the baseline.

    codes   c = clip(round(x / s) + z, qmin, qmax)
    output  (c - z) * s
    start   s, z cover the range that the observer chose

Symbols: s = `scale`, z = `zero_point`. A signed spec is symmetric, z = 0.
Provenance: textbook; Jacob et al., CVPR 2018, https://arxiv.org/abs/1712.05877. With `learn_scale`
the scale receives the gradient of LSQ (`qat.quantizers.lsq`) and the zero point stays.
"""

import math

import torch
from torch import Tensor, nn

from qat import ops
from qat.quantizers.base import Codes, Quantizer
from qat.quantizers.observers import MinMax, ObserverFactory, scale_of_range
from qat.spec import Operand, QuantSpec


class Affine(Quantizer):
    """Scale and zero point set from statistics; the gradient passes straight through.

    Args:
        spec: Bits, sign and granularity.
        shape: Trailing shape of the operand.
        operand: Role of the tensor in its product.
        observer: Statistics that choose the clipping range.
        learn_scale: Train the scale as well.
    """

    zero_point: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...],
        operand: Operand = Operand.INPUT,
        *,
        observer: ObserverFactory = MinMax,
        learn_scale: bool = False,
    ) -> None:
        super().__init__(spec, shape, operand)
        self.observer = observer(spec, shape)
        self.scale = nn.Parameter(torch.ones(spec.scale_shape(shape)), requires_grad=learn_scale)
        self.register_buffer("zero_point", torch.zeros(spec.scale_shape(shape)))
        values_per_scale = math.prod(shape) / self.scale.numel()
        self.grad_factor = 1 / math.sqrt(values_per_scale * spec.qmax)

    def observe(self, x: Tensor) -> None:
        """Show a batch to the observer."""
        self.observer.observe(x)

    def forget(self) -> None:
        """Reset the observer."""
        self.observer.reset()

    def freeze(self) -> None:
        """Scale and zero point from the observed range."""
        wide = self.observer.contains_zero
        self.set_grid(*scale_of_range(*self.observer.range(), self.spec, contains_zero=wide))

    @torch.no_grad()
    def set_grid(self, scale: Tensor, zero_point: Tensor | None) -> None:
        """Take a scale and, for an unsigned grid, a zero point."""
        self.scale.copy_(scale)
        if zero_point is not None:
            self.zero_point.copy_(zero_point)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Nearest value of the grid."""
        spec, offset = self.spec, self._offset()
        return ops.fake_quantize(x, self.scale, offset, spec.qmin, spec.qmax, self.grad_factor)

    def encode(self, x: Tensor) -> Codes:
        """Codes of `x` with scale and zero point.

        Raises:
            ValueError: If the zero point is a fraction, so that there are no integer codes.
        """
        spec, scale, offset = self.spec, self.scale.detach(), self._offset()
        # Costs are counted on meta tensors, which have no values.
        if offset is not None and not offset.is_meta and (offset != offset.round()).any():
            raise ValueError(
                f"the zero point of the {self.operand} is a fraction, so its codes are no "
                "integers; initialise with ptq_init.repq_vit.RepQViT(mode='paper'), which rounds it"
            )
        values = ops.quantize(x, scale, offset, spec.qmin, spec.qmax)
        return Codes(values.to(ops.code_dtype(spec.qmin, spec.qmax)), scale, offset)

    @property
    def packed_form(self) -> str:
        """Equal steps, signed or not."""
        return f"{'s' if self.spec.signed else 'u'}{self.spec.bits}"

    def restore(self, codes: Codes) -> Tensor:
        """Take scale and zero point; a weight on the grid has its codes."""
        zero_point = codes.zero_point
        self.set_grid(
            codes.scale.reshape(self.scale.shape),
            None if zero_point is None else zero_point.reshape(self.scale.shape),
        )
        return self.dequantize(Codes(codes.values, self.scale.detach(), self._offset()))

    def boundary_distance(self, x: Tensor) -> Tensor:
        """Distance to the nearest rounding boundary, in steps."""
        return ops.boundary_distance(x.detach() / self.scale.detach())

    def _offset(self) -> Tensor | None:
        return None if self.spec.signed else self.zero_point

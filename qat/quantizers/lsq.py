"""Learned Step Size Quantization (LSQ).

Esser, McKinstry, Bablani, Appuswamy, Modha. ICLR 2020. https://arxiv.org/abs/1902.08153

    forward   v_hat = round(clip(v / s, -Q_N, Q_P)) * s                    (Eqs. 1-2)
    d/ds      -v/s + round(v/s)  inside,  -Q_N below,  Q_P above           (Eq. 3)
    scaled by g = 1 / sqrt(N * Q_P), N = elements per scale                (Sec. 2.2)
    start     s = 2 * mean|v| / sqrt(Q_P)                                  (Sec. 2.1)

Symbols: s = `scale`, Q_N = -`qmin`, Q_P = `qmax`.
Deviations: the start averages all observed batches, the paper uses the first. For activations N is
the number of features of the operand, which does not depend on the batch. A step that training
drives through zero is used by its absolute value.
Provenance: gradients from a textbook restatement; equation numbers and start not yet checked.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat import ops
from qat.quantizers.base import Codes, Quantizer
from qat.quantizers.observers import Observer, ObserverFactory, scale_of_range
from qat.spec import Operand, QuantSpec


class MeanMagnitude(Observer):
    """The range whose grid has LSQ's starting step, 2 * mean|v| / sqrt(Q_P)."""

    total: Tensor

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...]) -> None:
        super().__init__(spec, shape)
        self._buffer("total", 0.0)

    def update(self, groups: Float[Tensor, "scales values"]) -> None:
        """Add this batch's mean magnitude."""
        self.total += groups.abs().mean(1)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The range `[qmin, qmax]` times the starting step."""
        step = 2 * self.total / self.count / math.sqrt(self.spec.qmax)
        return step * self.spec.qmin, step * self.spec.qmax


class LSQ(Quantizer):
    """Trained scale on a symmetric or non-negative grid, without zero point.

    Args:
        spec: Bits, sign and granularity; an unsigned grid suits operands that are never negative.
        shape: Trailing shape of the operand.
        operand: Role of the tensor in its product.
        observer: Statistics that choose the starting scale.

    Raises:
        ValueError: If the weights of a layer are to be unsigned.
    """

    has_zero_point = False
    steps_are_magnitudes = True

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...],
        operand: Operand = Operand.INPUT,
        *,
        observer: ObserverFactory = MeanMagnitude,
    ) -> None:
        super().__init__(spec, shape, operand)
        if operand is Operand.WEIGHT and not spec.signed:
            raise ValueError(
                "LSQ has no zero point, so an unsigned grid would lose all negative weights; leave "
                "`signed: false` out of the plan, as configs/plans/vit_w4a4.yaml does, or take the "
                "quantizer qat.quantizers.Affine with learn_scale"
            )
        self.observer = observer(spec, shape)
        self.scale = nn.Parameter(torch.ones(spec.scale_shape(shape)))
        values_per_scale = math.prod(shape) / self.scale.numel()
        self.grad_factor = 1 / math.sqrt(values_per_scale * spec.qmax)

    def observe(self, x: Tensor) -> None:
        """Show a batch to the observer."""
        self.observer.observe(x)

    def forget(self) -> None:
        """Reset the observer."""
        self.observer.reset()

    def freeze(self) -> None:
        """Starting scale from the observed range."""
        lower, upper = self.observer.range()
        if not self.spec.signed:
            lower = lower.clamp(min=0)
        with torch.no_grad():
            self.scale.copy_(scale_of_range(lower, upper, self.spec)[0])

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Nearest value of the grid; the scale receives LSQ's gradient."""
        spec = self.spec
        return ops.fake_quantize(x, self._step(), None, spec.qmin, spec.qmax, self.grad_factor)

    def encode(self, x: Tensor) -> Codes:
        """Codes of `x` with the scale."""
        spec, step = self.spec, self._step().detach()
        values = ops.quantize(x, step, None, spec.qmin, spec.qmax)
        return Codes(values.to(ops.code_dtype(spec.qmin, spec.qmax)), step)

    @property
    def packed_form(self) -> str:
        """Equal steps, signed or not."""
        return f"{'s' if self.spec.signed else 'u'}{self.spec.bits}"

    @torch.no_grad()
    def restore(self, codes: Codes) -> Tensor:
        """Take the scale; a weight on the grid has its codes."""
        self.scale.copy_(codes.scale.reshape(self.scale.shape))
        return self.dequantize(Codes(codes.values, self._step()))

    def boundary_distance(self, x: Tensor) -> Tensor:
        """Distance to the nearest rounding boundary, in steps."""
        return ops.boundary_distance(x.detach() / self._step().detach())

    def _step(self) -> Tensor:
        return self.scale.abs()

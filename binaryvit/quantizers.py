"""Binary quantizers: weights and activations on {-1, +1}, attention maps on {0, 1}.

    weight      alpha_o * sign(W~_o),  alpha_o = mean |W_o|,  W~_o = W_o - mean W_o
    activation  sign(shift(a))                                           the shift is ASM
    attention   s * round(clip(A / s, 0, 1)),  s learned, with LSQ's gradient

Provenance: *reconstruction*, assembled from what related binary ViTs and ReActNet do in code; see
`binaryvit.ops`. The paper is certain only in that weights and activations are binary.
Deviation: s starts at 2 * mean(A) of the calibration batches, LSQ's rule for one bit; related code
starts at 0.005, which fits 197 tokens only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from binaryvit import ops
from binaryvit.asm import ShiftFactory, StaticShift
from qat import Operand, Quantizer, QuantSpec
from qat.ops import boundary_distance, fake_quantize, quantize
from qat.quantizers import LSQ, Codes, Factory, QuantizerFactory


class BinaryWeight(Quantizer):
    """Weights on {-alpha, +alpha}, one alpha for each output channel, derived from the latents.

    Args:
        spec: One bit.
        shape: Shape of the weight.
        operand: Role of the tensor in its product.
        centre: Subtract the row mean before the sign.
    """

    supported_bits = range(1, 2)

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...],
        operand: Operand = Operand.WEIGHT,
        *,
        centre: bool = True,
    ) -> None:
        super().__init__(spec, shape, operand)
        self.centre = centre

    def observe(self, x: Tensor) -> None:
        """Nothing to observe: the scale follows the weight."""

    def freeze(self) -> None:
        """Nothing to freeze."""

    def forget(self) -> None:
        """Nothing to forget."""

    def latent(self, x: Tensor) -> Tensor:
        """The values whose signs are the codes."""
        return x - ops.row_mean(x) if self.centre else x

    def scale_of(self, x: Tensor) -> Tensor:
        """The scale alpha of each output channel, shape (out, 1, ...)."""
        return ops.row_mean(x.abs())

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Binary weights; the clipped straight-through estimator backward."""
        return ops.binarize_weight(x, self.latent(x), self.scale_of(x))

    def encode(self, x: Tensor) -> Codes:
        """-1 and +1, with the scale of each output channel."""
        return Codes(ops.sign(self.latent(x)).to(torch.int8), self.scale_of(x))

    @property
    def packed_form(self) -> str:
        """Signs and the scale of each output."""
        return "b1"

    def restore(self, codes: Codes) -> Tensor:
        """A weight with these signs, and with these scales to the last bit."""
        return ops.weight_of(codes.values, codes.scale)

    def boundary_distance(self, x: Tensor) -> Tensor:
        """Distance of the latent to zero, in units of alpha."""
        x = x.detach()
        return self.latent(x).abs() / self.scale_of(x)


class BinaryActivation(Quantizer):
    """Activations on {-1, +1} by the sign of the shifted activation.

    Args:
        spec: One bit.
        shape: Trailing shape of the operand.
        operand: Role of the tensor in its product.
        shift: Form of the activation shift module.
    """

    supported_bits = range(1, 2)

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...],
        operand: Operand = Operand.INPUT,
        *,
        shift: ShiftFactory = StaticShift,
    ) -> None:
        super().__init__(spec, shape, operand)
        self.shift = shift(shape)

    def observe(self, x: Tensor) -> None:
        """Calibrate the shift."""
        self.shift.calibrate(x)

    def freeze(self) -> None:
        """Nothing to freeze: the shift keeps its own state."""

    def forget(self) -> None:
        """Let the shift's next calibration start anew."""
        self.shift.forget()

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Signs; the Bi-Real estimator backward."""
        return ops.binarize_activation(self.shift(x))

    @property
    def packed_form(self) -> str | None:
        """The sign, by the form of the shift."""
        return self.shift.packed_form

    @torch.no_grad()
    def encode(self, x: Tensor) -> Codes:
        """-1 and +1."""
        return Codes(ops.sign(self.shift(x)).to(torch.int8), x.new_ones(()))


class BinaryAttentionMap(Quantizer):
    """Softmax outputs on {0, s}, with a learned s.

    Args:
        spec: One bit.
        shape: Trailing shape of the operand.
        operand: Role of the tensor in its product.
    """

    supported_bits = range(1, 2)
    steps_are_magnitudes = True
    total: Tensor
    count: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...],
        operand: Operand = Operand.ATTENTION,
    ) -> None:
        super().__init__(spec, shape, operand)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("total", torch.zeros(()), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long), persistent=False)

    def observe(self, x: Tensor) -> None:
        """Add the mean of a batch of attention maps."""
        self.total += x.mean()
        self.count += 1

    def freeze(self) -> None:
        """Start s at twice the mean attention."""
        if not self.count:
            raise RuntimeError("the attention map saw no data; calibrate with at least one batch")
        with torch.no_grad():
            self.scale.copy_(2 * self.total / self.count)

    def forget(self) -> None:
        """Reset the running mean."""
        self.total.zero_()
        self.count.zero_()

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Values 0 and s."""
        return fake_quantize(x, self.scale.abs(), None, 0, 1)

    def encode(self, x: Tensor) -> Codes:
        """0 and 1, with s."""
        scale = self.scale.detach().abs()
        return Codes(quantize(x, scale, None, 0, 1).to(torch.uint8), scale)

    @property
    def packed_form(self) -> str:
        """Zero and s."""
        return "map"

    def boundary_distance(self, x: Tensor) -> Tensor:
        """Distance to s / 2, in units of s."""
        return boundary_distance(x.detach() / self.scale.detach().abs())


@dataclass(frozen=True)
class BinaryQuantizers(Factory):
    """Factory: binary quantizers for one-bit specs, another factory for wider ones.

    Attributes:
        shift: Form of the activation shift module, see `binaryvit.asm`.
        centre: Subtract row means from weights before the sign.
        wider: Factory for operands of more than one bit.
    """

    shift: ShiftFactory = StaticShift
    centre: bool = True
    wider: QuantizerFactory = LSQ

    def __call__(self, spec: QuantSpec, shape: tuple[int, ...], operand: Operand) -> Quantizer:
        """The quantizer of one operand."""
        if spec.bits > 1:
            return self.wider(spec, shape, operand)
        match operand:
            case Operand.WEIGHT:
                return BinaryWeight(spec, shape, operand, centre=self.centre)
            case Operand.ATTENTION:
                return BinaryAttentionMap(spec, shape, operand)
            case _:
                return BinaryActivation(spec, shape, operand, shift=self.shift)

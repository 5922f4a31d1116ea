"""ASM, the activation shift module: adapts activations, channel by channel, before the sign.

BinaryViT, Xiao et al., arXiv 2305.14730 and IEEE TCSVT 2024, DOI 10.1109/TCSVT.2024.3457610.

The abstracts say that ASM adapts the activation distribution, dynamically, before the sign
function, against inter-channel variation. The formula is not public: the four forms below are
*reconstructions*. For channel c of activation a,

    A1  StaticShift        sign(a_c - b_c)                                    RSign of ReActNet
    A2  DynamicShift       sign(a_c - b_c - g_c * mean_c(a))
    A3  ScaledShift        sign((a_c - b_c) / s_c), s_c learned
    A4  StandardizedShift  sign((a_c - m_c) / d_c - b_c), running mean m and deviation d

A2's mean runs over the tokens of the same image (of the same window in Swin), so a prediction does
not depend on its batch. In A3 and A4 the scale cannot change a sign; it rescales the window of the
surrogate gradient. A1 is likely part of the paper's baseline. A2 is nearest to the abstract, since
it alone follows the image; A4 gained accuracy over A1 where the others did not, and is what the
recipes use (docs/results.md). Costs per site: C parameters (A1), 2C (A2, A3), C and 2C running
statistics (A4).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat.ops import token_axes


class Shift(nn.Module, ABC):
    """Maps activations to values whose sign is the binary activation.

    Args:
        shape: Trailing shape of the operand: (features,) for linear inputs, (heads, 1, head_dim)
            for attention operands, (channels, 1, 1) for convolution inputs.
    """

    packed_form: ClassVar[str | None] = None
    """Name of the form in a packed file, see `qat.packed.network`; None where it has none."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.shift = nn.Parameter(torch.zeros(shape))

    @abstractmethod
    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Shift the activations."""

    def calibrate(self, x: Float[Tensor, "..."]) -> None:
        """See one calibration batch."""

    def forget(self) -> None:
        """Let the next calibration start anew."""


ShiftFactory = Callable[[tuple[int, ...]], Shift]


class StaticShift(Shift):
    """A1: a learned threshold for each channel (RSign)."""

    packed_form = "sign"

    def forward(self, x: Tensor) -> Tensor:
        """`x - shift`."""
        return x - self.shift


class DynamicShift(Shift):
    """A2: a threshold that follows the channel's mean over the tokens of the image.

    Args:
        shape: Trailing shape of the operand.
        gain: Start of the learned weight of the mean; 0 starts as A1, 1 as full centring.
    """

    packed_form = "sign-mean"

    def __init__(self, shape: tuple[int, ...], gain: float = 0.0) -> None:
        super().__init__(shape)
        self.gain = nn.Parameter(torch.full(shape, gain))

    def forward(self, x: Tensor) -> Tensor:
        """`x - shift - gain * mean over tokens`; pooled features have no tokens and no mean."""
        axes = token_axes(x, self.shape)
        if not axes:
            return x - self.shift
        return x - torch.addcmul(self.shift, self.gain, x.mean(axes, keepdim=True))


class ScaledShift(Shift):
    """A3: a learned threshold and a learned scale that equalizes gradients over channels.

    The scale starts at the channel's standard deviation, averaged over calibration batches.
    """

    packed_form = "sign-scaled"
    num_batches: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.scale = nn.Parameter(torch.ones(shape))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(x - shift) / scale`; the scale counts by its size."""
        return (x - self.shift) / self.scale.abs().clamp(min=1e-3)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Move the scale to the mean deviation of the batches seen."""
        self.num_batches += 1
        deviation = _moments(x, self.shape)[1].sqrt().clamp(min=1e-3)
        self.scale.lerp_(deviation, 1 / self.num_batches)

    def forget(self) -> None:
        """Drop the count of batches."""
        self.num_batches.zero_()


class StandardizedShift(Shift):
    """A4: standardized by running statistics of training, then shifted by a learned threshold.

    The running statistics also normalize in training, so there is no gap between training and
    evaluation. At inference mean, deviation and shift fold into one threshold for each channel.

    Args:
        shape: Trailing shape of the operand.
        momentum: Weight of a training batch in the running statistics.
    """

    packed_form = "sign-standardized"
    mean: Tensor
    variance: Tensor
    num_batches: Tensor

    def __init__(self, shape: tuple[int, ...], momentum: float = 0.01) -> None:
        super().__init__(shape)
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(x - mean) / deviation - shift`."""
        if self.training and torch.is_grad_enabled():
            self._update(x.detach(), self.momentum)
        # A copy, since the next training batch moves the buffer before this one's backward.
        deviation = self.variance.clone().add_(1e-6).sqrt_()
        return (x - self.mean) / deviation - self.shift

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Average the statistics of calibration batches."""
        self.num_batches += 1
        self._update(x, 1 / int(self.num_batches))

    def forget(self) -> None:
        """Drop the count of batches."""
        self.num_batches.zero_()

    def _update(self, x: Tensor, weight: float) -> None:
        mean, variance = _moments(x, self.shape)
        self.mean.lerp_(mean, weight)
        self.variance.lerp_(variance, weight)


def _moments(x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and variance over batch and tokens, for each channel, in the trailing shape."""
    variance, mean = torch.var_mean(x, dim=[0, *token_axes(x, shape)], correction=0)
    return mean.reshape(shape), variance.reshape(shape)

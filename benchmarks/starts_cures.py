"""Cures for oscillating weights that `starts.py` compares; each is a `Regularizer`.

With latent w, its value on the grid w^, g the gradient of the loss and a ramp r that grows from 0
to 1 along half a cosine over training:

    Pull    g + strength r mean|g| (w - w^) / (s/2)      coupled like GRS: the strength has no unit
    Dampen  g + strength r 2 (w - w^)                    Nagel et al. 2022, Eq. 5, of |w - w^|^2
    Freeze  a weight that oscillates more often than a threshold stays on its mean code

Freezing is that of Nagel et al. 2022, https://arxiv.org/abs/2203.11086: frequency and mean code are
moving averages, the threshold falls along half a cosine from 0.04 to `strength`. Pull and Dampen
leave weights outside of their grid alone. Provenance of Pull: ours, GRS for grids of more values.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qat.layers import quantized_weights
from qat.quantizers import Affine, Codes
from qat.train.oscillation import Oscillation
from qat.train.regularize import Regularizer

MOMENTUM, FIRST_THRESHOLD = 0.01, 0.04


@dataclass(frozen=True)
class Pull:
    """Towards the nearest code, in proportion to the gradient's size."""

    strength: float

    @torch.no_grad()
    def adjust_gradients(self, model: nn.Module, progress: float) -> None:
        """Add the term."""
        for weight, quantizer, gap in _gaps(model):
            assert weight.grad is not None
            size = weight.grad.abs().mean() * _ramp(progress) * self.strength
            weight.grad.add_(gap / (quantizer.scale / 2) * size)

    def adjust_weights(self, model: nn.Module, lr: float, progress: float) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Dampen:
    """Towards the nearest code, by the gradient of the squared distance."""

    strength: float

    @torch.no_grad()
    def adjust_gradients(self, model: nn.Module, progress: float) -> None:
        """Add the term."""
        for weight, _, gap in _gaps(model):
            assert weight.grad is not None
            weight.grad.add_(gap, alpha=2 * self.strength * _ramp(progress))

    def adjust_weights(self, model: nn.Module, lr: float, progress: float) -> None:
        """Nothing."""


@dataclass
class Frozen:
    """State of one weight under `Freeze`."""

    seen: Oscillation
    mean: Tensor
    held: Tensor


@dataclass
class Freeze:
    """Holds the weights that oscillate."""

    strength: float
    weights: dict[str, Frozen] = field(default_factory=dict)

    def adjust_gradients(self, model: nn.Module, progress: float) -> None:
        """Nothing."""

    @torch.no_grad()
    def adjust_weights(self, model: nn.Module, lr: float, progress: float) -> None:
        """Count, freeze, and put the frozen ones back on their code."""
        threshold = self.strength + (FIRST_THRESHOLD - self.strength) * (1 - _ramp(progress))
        for name, weight, quantizer in _trained(model):
            codes = quantizer.codes(weight)
            if name not in self.weights:
                seen, mean = Oscillation(codes.values, MOMENTUM), codes.values.float()
                self.weights[name] = Frozen(seen, mean, torch.zeros_like(mean, dtype=torch.bool))
            state = self.weights[name]
            state.seen.update(codes.values)
            state.mean.lerp_(codes.values.float(), MOMENTUM)
            fresh = state.seen.oscillating(threshold) & ~state.held
            state.mean[fresh] = state.mean[fresh].round()
            state.held |= fresh
            state.mean = torch.where(state.held, state.mean.round(), state.mean)
            kept = quantizer.decode(Codes(state.mean, codes.scale, codes.zero_point))
            weight.copy_(torch.where(state.held, kept, weight))


CURES: dict[str, Callable[[float], Regularizer]] = {
    "pull": Pull,
    "dampen": Dampen,
    "freeze": Freeze,
}


def _ramp(progress: float) -> float:
    return (1 - math.cos(math.pi * progress)) / 2


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Affine]]:
    for name, weight, quantizer in quantized_weights(model):
        assert isinstance(quantizer, Affine)
        yield name, weight, quantizer


def _gaps(model: nn.Module) -> Iterator[tuple[nn.Parameter, Affine, Tensor]]:
    """Weights, and what separates them from their code; at most half a step, else nothing."""
    for _, weight, quantizer in _trained(model):
        gap = weight - quantizer.fake_quantize(weight)
        yield weight, quantizer, gap * (gap.abs() <= quantizer.scale.abs() / 2)

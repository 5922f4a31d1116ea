"""GRS, the gradient regularization scheme: moves latent weights away from the sign boundary.

BinaryViT, Xiao et al., arXiv 2305.14730 and IEEE TCSVT 2024, DOI 10.1109/TCSVT.2024.3457610.

The abstracts say that GRS drives weights to a bimodal distribution, moving latents smoothly away
from the boundary during training, to reduce oscillation. The equation is not public: the five
forms below are *reconstructions*. With latent w, centred, k the row mean of |w| before centring,
g the gradient of the loss and descent along g + strength * R:

    G1  DistancePull     R = -sgn(w) * (1 - |w|/k)                            the default
    G2  SignPull         R = -sgn(w) * sgn(k - |w|)
    G3  BoundaryPull     R = -sgn(w) * exp(-(w / (tau k))^2)
    G4  KurtosisPull     R = gradient of (Kurt(w) - target)^2, at unit mean magnitude
    G5  GradientDamping  g <- g * (1 - strength * 1[g w > 0] * max(0, 1 - |w|/k))

Coupled, R is scaled by the mean |g| of the tensor, so that the strength has no unit, and goes
through the optimizer with g. Decoupled, the weight moves by -lr * strength * R beside the
optimizer's step, as in AdamW's decay. G5 scales gradients, so it exists coupled only.

Too large a strength freezes the starting signs: a flip rate near zero is no sign of success.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from binaryvit.ops import sign
from binaryvit.quantizers import BinaryWeight
from qat.layers import quantized_weights

Latent = Float[Tensor, " out *inner"]
Scale = Float[Tensor, " out *ones"]


class Pull(ABC):
    """A form of GRS that adds a term to the gradient."""

    @abstractmethod
    def direction(self, w: Latent, k: Scale) -> Latent:
        """The term R for latents `w` with row scale `k`."""


@dataclass(frozen=True)
class DistancePull(Pull):
    """G1: towards the two modes +-k, in proportion to the distance. Gradient of (|w| - k)^2 / 2k.

    Attributes:
        one_sided: Leave weights beyond the modes alone.
    """

    one_sided: bool = False

    def direction(self, w: Latent, k: Scale) -> Latent:
        """`-sgn(w) * (1 - |w|/k)`."""
        distance = 1 - w.abs() / k
        return -sign(w) * (distance.clamp(min=0) if self.one_sided else distance)


@dataclass(frozen=True)
class SignPull(Pull):
    """G2: towards the modes at constant speed. Gradient of ||w| - k|."""

    def direction(self, w: Latent, k: Scale) -> Latent:
        """`-sgn(w) * sgn(k - |w|)`."""
        return -sign(w) * torch.sign(k - w.abs())


@dataclass(frozen=True)
class BoundaryPull(Pull):
    """G3: away from zero, acting near it only.

    Attributes:
        tau: Reach, in units of k.
    """

    tau: float = 0.5

    def direction(self, w: Latent, k: Scale) -> Latent:
        """`-sgn(w) * exp(-(w / (tau k))^2)`."""
        return -sign(w) * torch.exp(-((w / (self.tau * k)) ** 2))


@dataclass(frozen=True)
class KurtosisPull(Pull):
    """G4: towards a kurtosis, over the whole tensor.

    Attributes:
        target: 1 is that of two points, 1.8 that of a uniform distribution.
    """

    target: float = 1.8

    def direction(self, w: Latent, k: Scale) -> Latent:
        """Gradient of `(Kurt(w) - target)^2`, at unit mean magnitude."""
        z = (w - w.mean()) / w.std(correction=0).clamp(min=torch.finfo(w.dtype).tiny)
        cubes = z**3
        kurtosis = (cubes * z).mean()
        gradient = (kurtosis - self.target).sign() * (cubes - cubes.mean() - kurtosis * z)
        return gradient / gradient.abs().mean().clamp(min=torch.finfo(w.dtype).tiny)


@dataclass(frozen=True)
class GradientDamping:
    """G5: damps the part of the gradient that pulls a weight towards zero."""

    def damp(self, gradient: Latent, w: Latent, k: Scale, strength: float) -> Latent:
        """`g * (1 - strength * 1[g w > 0] * max(0, 1 - |w|/k))`."""
        near = (1 - w.abs() / k).clamp(min=0)
        return gradient * (1 - strength * near * (gradient * w > 0))


def constant(progress: float) -> float:
    """Full strength throughout."""
    return 1.0


def cosine_ramp(progress: float) -> float:
    """From 0 to full strength along half a cosine: early flips are learning."""
    return (1 - math.cos(math.pi * progress)) / 2


def last_tenth(progress: float) -> float:
    """Full strength in the last tenth of training only, as BHViT does."""
    return float(progress >= 0.9)


@dataclass(frozen=True)
class GRS:
    """Applies a form of GRS to every binary weight of a model; a `Regularizer`.

    Attributes:
        form: One of G1 to G5.
        strength: Largest factor lambda of the term; for G5 the share that is damped, at most 1.
        schedule: Share of the strength at a point of training, both from 0 to 1.
        decoupled: Move weights beside the optimizer's step, not through it.

    Raises:
        ValueError: If a decoupled G5 is asked for, or the strength is out of range.
    """

    form: Pull | GradientDamping
    strength: float = 0.1
    schedule: Callable[[float], float] = cosine_ramp
    decoupled: bool = False

    def __post_init__(self) -> None:
        damps = isinstance(self.form, GradientDamping)
        if self.decoupled and damps:
            raise ValueError("GradientDamping scales gradients, so it cannot be decoupled")
        if self.strength < 0 or (damps and self.strength > 1):
            raise ValueError(
                f"GRS.strength must not be negative, nor above 1 for GradientDamping, got "
                f"{self.strength}"
            )

    @torch.no_grad()
    def adjust_gradients(self, model: nn.Module, progress: float) -> None:
        """Change the gradients of the binary weights, after backward and before the optimizer."""
        strength = self.strength * self.schedule(progress)
        for weight, w, k in self._latents(model):
            if self.decoupled or weight.grad is None:
                continue
            if isinstance(self.form, GradientDamping):
                weight.grad.copy_(self.form.damp(weight.grad, w, k, strength))
            else:
                size = weight.grad.abs().mean()
                weight.grad.add_(self.form.direction(w, k) * size, alpha=strength)

    @torch.no_grad()
    def adjust_weights(self, model: nn.Module, lr: float, progress: float) -> None:
        """Move the binary weights, after the optimizer's step."""
        if not self.decoupled or isinstance(self.form, GradientDamping):
            return
        strength = self.strength * self.schedule(progress)
        for weight, w, k in self._latents(model):
            if weight.requires_grad:
                weight.add_(self.form.direction(w, k), alpha=-lr * strength)

    @staticmethod
    def _latents(model: nn.Module) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
        found = [
            (
                weight,
                quantizer.latent(weight),
                quantizer.scale_of(weight).clamp(min=torch.finfo(weight.dtype).tiny),
            )
            for _, weight, quantizer in quantized_weights(model)
            if isinstance(quantizer, BinaryWeight)
        ]
        if not found:
            raise ValueError("GRS acts on binary weights and the model has none; leave it out")
        return found

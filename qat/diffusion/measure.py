"""How good a diffusion model is, and how far a quantized one departs from its original."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qat.diffusion.judge import Judge
from qat.diffusion.schedule import NoiseSchedule

BATCH = 64
"""Images a forward pass."""


@dataclass(frozen=True)
class Prediction:
    """Noise predictions of a model for the same images at several time steps.

    Attributes:
        times: The time steps.
        eps: The predictions, (times, images, channels, height, width).
        noise: The true noise, of that shape.
    """

    times: Int[Tensor, " times"]
    eps: Float[Tensor, "times images c h w"]
    noise: Float[Tensor, "times images c h w"]

    def errors(self) -> Float[Tensor, " times"]:
        """Mean squared error of each time step."""
        return (self.eps - self.noise).square().mean((1, 2, 3, 4))

    def gaps(self, original: "Prediction") -> Float[Tensor, " times"]:
        """Mean squared distance to another model's predictions, for each time step."""
        return (self.eps - original.eps).square().mean((1, 2, 3, 4))


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Float[Tensor, "images c h w"],
    labels: Int[Tensor, " images"],
    schedule: NoiseSchedule,
    num_times: int,
    generator: torch.Generator,
) -> Prediction:
    """Predict the noise in images at evenly spread time steps.

    Args:
        model: A `DiT`.
        images: Clean images.
        labels: Their classes.
        schedule: The schedule of training.
        num_times: Number of time steps, each in the middle of its part of the schedule.
        generator: Draws the noise.
    """
    times = schedule.spread(num_times)
    shape = (num_times, *images.shape)
    noise = torch.randn(shape, generator=generator).to(images)
    eps = torch.empty_like(noise)
    for i, time in enumerate(times.tolist()):
        for first in range(0, len(images), BATCH):
            part = slice(first, first + BATCH)
            at = torch.full_like(labels[part], time)
            noisy = schedule.add_noise(images[part], noise[i, part], at.cpu())
            eps[i, part] = model(noisy, at, labels[part])
    return Prediction(times, eps, noise)


def noise_errors(
    model: nn.Module,
    images: Float[Tensor, "images c h w"],
    labels: Int[Tensor, " images"],
    schedule: NoiseSchedule,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " images"]:
    """Mean squared error of the predicted noise of each image, at a random time step.

    Args:
        model: A `DiT`.
        images: Clean images.
        labels: Their classes.
        schedule: The schedule of training.
        generator: Draws time steps and noise; None takes the global one.
    """
    times = torch.randint(schedule.num_steps, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator).to(images)
    noisy = schedule.add_noise(images, noise, times)
    return (model(noisy, times.to(images.device), labels) - noise).square().mean((1, 2, 3))


def noisy_copies(
    images: Float[Tensor, "images c h w"],
    labels: Int[Tensor, " images"],
    schedule: NoiseSchedule,
    copies: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "noisy c h w"], Int[Tensor, " noisy"], Int[Tensor, " noisy"]]:
    """Inputs of a diffusion model at all time steps: noisy images, their steps, their classes.

    Args:
        images: Clean images.
        labels: Their classes.
        schedule: The schedule of training.
        copies: Noisy copies of each image, at time steps spread evenly over all.
        generator: Draws which copy gets which time step, and the noise.
    """
    count = len(images) * copies
    times = schedule.spread(count)[torch.randperm(count, generator=generator)]
    images = images.repeat(copies, 1, 1, 1)
    noise = torch.randn(images.shape, generator=generator)
    return schedule.add_noise(images, noise, times), times, labels.repeat(copies)


@torch.no_grad()
def in_parts(
    sample: Callable[[Tensor, Tensor], Tensor], noise: Tensor, labels: Tensor
) -> Float[Tensor, "images c h w"]:
    """Samples for noise and labels, some at a time."""
    pairs = zip(noise.split(2 * BATCH), labels.split(2 * BATCH), strict=True)
    return torch.cat([sample(*pair) for pair in pairs])


@dataclass(frozen=True)
class Verdict:
    """What a judge sees in images.

    Attributes:
        classes: The class that it sees in each.
        features: Its features of each.
    """

    classes: Int[Tensor, " images"]
    features: Float[Tensor, "images features"]


@torch.no_grad()
def judged(judge: Judge, images: Float[Tensor, "images 1 h w"]) -> Verdict:
    """Let a judge look at images."""
    features = judge.forward_features(images)
    return Verdict(judge.head(features).argmax(1), features)


def frechet(first: Float[Tensor, "images features"], second: Float[Tensor, "_ features"]) -> float:
    """Squared Fréchet distance of normal distributions fitted to two sets of features.

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)

    Heusel et al., NeurIPS 2017, https://arxiv.org/abs/1706.08500. It is biased upwards for few
    images, so that only distances of equally many compare.
    """
    means, covariances = zip(*(_moments(x) for x in (first, second)), strict=True)
    root = _root(covariances[0])
    cross = _root(root @ covariances[1] @ root)
    spread = covariances[0].trace() + covariances[1].trace() - 2 * cross.trace()
    return float((means[0] - means[1]).square().sum() + spread)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double()
    return x.mean(0), torch.cov(x.T)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T

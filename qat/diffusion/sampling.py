"""Sampling: DDPM takes every step and adds noise, DDIM takes few and adds none."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qat.diffusion.schedule import NoiseSchedule

Predict = Callable[[Tensor, Tensor], Tensor]
"""From noisy images and their time steps to the noise in them."""


def guided(model: nn.Module, labels: Int[Tensor, " batch"], guidance: float = 1.0) -> Predict:
    """Noise prediction for given classes, with classifier-free guidance.

    Ho and Salimans, https://arxiv.org/abs/2207.12598:
    `eps(none) + guidance (eps(class) - eps(none))`.

    Args:
        model: A `DiT`.
        labels: Class of each image.
        guidance: 1 follows the class alone, more exaggerates it.

    Raises:
        ValueError: If guidance is asked of a model that knows no absent class.
    """
    if guidance == 1.0:
        return lambda x, times: model(x, times, labels)
    if not model.null_class:
        raise ValueError(
            f"guidance {guidance} needs a model with null_class, trained with class_dropout; use "
            "guidance 1"
        )
    none = torch.full_like(labels, int(model.num_classes))  # type: ignore[arg-type]

    def predict(x: Tensor, times: Tensor) -> Tensor:
        both = model(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([labels, none]))
        own, plain = both.chunk(2)
        return plain + guidance * (own - plain)

    return predict


@torch.no_grad()
def ddim(
    predict: Predict,
    noise: Float[Tensor, "batch c h w"],
    schedule: NoiseSchedule,
    num_steps: int = 50,
) -> Float[Tensor, "batch c h w"]:
    """Deterministic sampling, Song et al., ICLR 2021, https://arxiv.org/abs/2010.02502, eta = 0.

        x_s = sqrt(A_s) x_0 + sqrt(1 - A_s) eps,   x_0 = (x_t - sqrt(1 - A_t) eps) / sqrt(A_t)

    x_0 is clamped to [-1, 1], and eps follows from it.

    Args:
        predict: Noise prediction.
        noise: Where sampling starts; the same noise gives the same images.
        schedule: The schedule of training.
        num_steps: Evenly spaced steps.

    Raises:
        ValueError: If there are more steps than the schedule has.
    """
    if not 1 <= num_steps <= schedule.num_steps:
        raise ValueError(f"num_steps must be 1 to {schedule.num_steps}, got {num_steps}")
    signal = schedule.signal().to(noise)
    times = torch.linspace(schedule.num_steps - 1, 0, num_steps).round().long()
    x = noise
    for i, time in enumerate(times.tolist()):
        left = signal[time]
        after = signal[times[i + 1]] if i + 1 < num_steps else torch.ones_like(left)
        eps = predict(x, torch.full((len(x),), time, device=x.device))
        image = ((x - (1 - left).sqrt() * eps) / left.sqrt()).clamp_(-1, 1)
        eps = (x - left.sqrt() * image) / (1 - left).sqrt()
        x = after.sqrt() * image + (1 - after).sqrt() * eps
    return x


@torch.no_grad()
def ddpm(
    predict: Predict,
    noise: Float[Tensor, "batch c h w"],
    schedule: NoiseSchedule,
    generator: torch.Generator,
) -> Float[Tensor, "batch c h w"]:
    """Ancestral sampling, Ho et al., NeurIPS 2020, https://arxiv.org/abs/2006.11239, Algorithm 2.

    The variance of a step is that of the posterior, and x_0 is clamped to [-1, 1].

    Args:
        predict: Noise prediction.
        noise: Where sampling starts.
        schedule: The schedule of training; every step of it is taken.
        generator: Draws the noise of each step.
    """
    betas, signal = schedule.betas().to(noise), schedule.signal().to(noise)
    before = torch.cat([torch.ones_like(signal[:1]), signal[:-1]])
    x = noise
    for time in reversed(range(schedule.num_steps)):
        left, left_before, beta = signal[time], before[time], betas[time]
        eps = predict(x, torch.full((len(x),), time, device=x.device))
        image = ((x - (1 - left).sqrt() * eps) / left.sqrt()).clamp_(-1, 1)
        mean = left_before.sqrt() * beta * image + (1 - beta).sqrt() * (1 - left_before) * x
        x = mean / (1 - left)
        if time:
            draw = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = x + (beta * (1 - left_before) / (1 - left)).sqrt() * draw
    return x

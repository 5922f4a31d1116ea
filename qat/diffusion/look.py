"""A look at a diffusion model: what it predicts and generates, and how far two models differ."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.utils import save_image

from qat import disk
from qat.diffusion.measure import Prediction, Verdict, frechet, in_parts, predict
from qat.diffusion.schedule import NoiseSchedule

Sample = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""From a model, noise and classes to images."""


@dataclass(frozen=True)
class Look:
    """What one model predicted and generated.

    Attributes:
        schedule: Schedule of its training.
        prediction: Noise predictions on real images.
        samples: Generated images.
        asked: The classes that were asked for.
        verdict: What a judge sees in the samples; None without a judge.
    """

    schedule: NoiseSchedule
    prediction: Prediction
    samples: Float[Tensor, "samples c h w"]
    asked: Int[Tensor, " samples"]
    verdict: Verdict | None = None

    def items(self, truth: Verdict | None) -> dict[str, Any]:
        """Measures of the model.

        Args:
            truth: What the judge sees in real images; needed where there is a verdict.
        """
        items: dict[str, Any] = {"noise_error": float(self.prediction.errors().mean())}
        if self.verdict is not None and truth is not None:
            right = self.verdict.classes == self.asked
            items["class_accuracy"] = float(right.double().mean())
            items["frechet"] = frechet(self.verdict.features, truth.features)
        return items

    def departure(self, exact: "Look") -> dict[str, Any]:
        """Distances to what another model predicts and generates."""
        gap = self.samples - exact.samples
        items = {
            "noise_gap": float(self.prediction.gaps(exact.prediction).mean()),
            "sample_error": float(gap.norm() / exact.samples.norm()),
        }
        if self.verdict is not None and exact.verdict is not None:
            same = self.verdict.classes == exact.verdict.classes
            items["agreement"] = float(same.double().mean())
        return items

    def by_time(self, num_groups: int, exact: "Look | None" = None) -> list[dict[str, Any]]:
        """Noise errors by groups of time steps, beside those of another model if there is one."""
        table = []
        size = self.schedule.num_steps // num_groups
        for first in range(0, size * num_groups, size):
            inside = (self.prediction.times >= first) & (self.prediction.times < first + size)
            row: dict[str, Any] = {"first": first, "last": first + size - 1}
            row["noise_error"] = float(self.prediction.errors()[inside].mean())
            if exact is not None:
                row["noise_error_float"] = float(exact.prediction.errors()[inside].mean())
                row["noise_gap"] = float(self.prediction.gaps(exact.prediction)[inside].mean())
            table.append(row)
        return table

    def save(self, path: Path) -> None:
        """Write the samples as one image, a column for each class."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.replacing(path) as file:
            save_image(self.samples[:100] / 2 + 0.5, file, "png", nrow=10)


def look_at(
    model: nn.Module,
    images: Float[Tensor, "images c h w"],
    labels: Int[Tensor, " images"],
    schedule: NoiseSchedule,
    sample: Sample,
    num_times: int,
    num_samples: int,
    seed: int,
) -> Look:
    """Predict the noise in real images, and generate images of all classes in turn.

    Args:
        model: A `DiT`.
        images: Real images.
        labels: Their classes.
        schedule: Schedule of its training.
        sample: The sampler.
        num_times: Time steps at which noise is predicted.
        num_samples: Images generated.
        seed: Draws the noise: the same for all models.
    """
    generator = torch.Generator().manual_seed(seed)
    prediction = predict(model, images, labels, schedule, num_times, generator)
    asked = torch.arange(num_samples, device=images.device) % int(model.num_classes)  # type: ignore[arg-type]
    noise = torch.randn((num_samples, *images.shape[1:]), generator=generator).to(images)
    samples = in_parts(lambda x, y: sample(model, x, y), noise, asked)
    return Look(schedule, prediction, samples, asked)

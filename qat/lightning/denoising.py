"""Diffusion models as a task: trained to predict noise, judged by errors and by samples."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric
from torchvision.utils import save_image

from qat import checkpoint as files
from qat.calibrate import Batch
from qat.diffusion.judge import Judge
from qat.diffusion.measure import Prediction, Verdict, frechet, in_parts, judged, predict
from qat.diffusion.sampling import ddim, ddpm, guided
from qat.diffusion.schedule import NoiseSchedule
from qat.lightning.data import VisionData
from qat.lightning.tasks import Form, Task
from qat.lightning.training import Training
from qat.train.losses import Objective

EVALUATION_SEED = 20_000
"""With the seed of the run, seeds evaluation noise and samples: the same for every method."""


class NoisePrediction(Training):
    """Trains a DiT to predict the noise in images at random time steps.

    Args:
        task: Schedule, and the share of images whose class is withheld.
        arguments: Those of `Training`.
    """

    def __init__(self, task: "Denoising", **arguments: Any) -> None:
        super().__init__(**arguments)
        self.task = task
        if task.class_dropout and not self.model.null_class:
            raise ValueError(
                f"task.class_dropout {task.class_dropout} needs a model with null_class; set it "
                "to 0 for a model that always knows the class"
            )
        self.noise_error, self.num_images = MeanMetric(), SumMetric()

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Mean squared error of the predicted noise."""
        images, labels = batch
        withheld = torch.rand(len(labels), device=labels.device) < self.task.class_dropout
        labels = torch.where(withheld, self.model.num_classes, labels)  # type: ignore[call-overload]
        loss = self._error(images, labels, None).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """The same, for noise and time steps that are the same in every epoch."""
        images, labels = batch
        generator = torch.Generator().manual_seed(EVALUATION_SEED + batch_idx)
        self.noise_error(self._error(images, labels, generator))
        self.num_images(len(labels))
        self.log("val/noise_error", self.noise_error, prog_bar=True)
        self.log("val/n_images", self.num_images)

    def calibration_batches(self) -> Iterable[Any]:
        """Noisy images of all time steps."""
        return self.task.calibration_batches(self.trainer.datamodule)  # type: ignore[attr-defined]

    def _error(self, images: Tensor, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        schedule = self.task.schedule
        times = torch.randint(schedule.num_steps, (len(images),), generator=generator)
        noise = torch.randn(images.shape, generator=generator).to(images)
        noisy = schedule.add_noise(images, noise, times)
        return (self.model(noisy, times.to(images.device), labels) - noise).square().mean((1, 2, 3))


@dataclass(frozen=True)
class Denoising(Task):
    """Class-conditional diffusion of small grey images.

    Attributes:
        schedule: Noise schedule of training and sampling.
        class_dropout: Share of training images whose class is withheld, for guidance.
        judge: Checkpoint of an independent classifier, `qat.diffusion.judge`; set by the command
            where the recipe has a `judge_config`.
        sampler: `ddim`, without noise, or `ddpm`, which takes every step.
        sampling_steps: Steps of DDIM.
        guidance: Weight of the class in sampling; 1 is none.
        num_samples: Images generated, of all classes in turn.
        num_images: Real images that noise errors are measured on.
        num_times: Time steps that noise errors are measured at.
        num_groups: Groups of time steps that the table of errors tells apart.
        calibration_times: Noisy copies of each calibration image, at time steps spread evenly.
    """

    schedule: NoiseSchedule = NoiseSchedule()  # noqa: RUF009 - a frozen value
    class_dropout: float = 0.0
    judge: str | None = None
    sampler: Literal["ddim", "ddpm"] = "ddim"
    sampling_steps: int = 20
    guidance: float = 1.0
    num_samples: int = 100
    num_images: int = 64
    num_times: int = 16
    num_groups: int = 4
    calibration_times: int = 8

    monitor = ("val/noise_error", "min")
    rows: ClassVar[Mapping[str, Form]] = {
        "noise error": ("noise_error", "{:.5f}"),
        "noise error, float": ("noise_error_float", "{:.5f}"),
        "distance to float predictions": ("noise_gap", "{:.5f}"),
        "class accuracy of samples": ("class_accuracy", "{:.4f}"),
        "class accuracy, float": ("class_accuracy_float", "{:.4f}"),
        "Fréchet distance": ("frechet", "{:.3f}"),
        "Fréchet distance, float": ("frechet_float", "{:.3f}"),
        "distance to float samples, relative": ("sample_error", "{:.4f}"),
        "samples judged as the float ones": ("agreement", "{:.4f}"),
    }
    columns: ClassVar[Mapping[str, int]] = {
        "noise_error": 4,
        "noise_gap": 4,
        "class_accuracy": 4,
        "frechet": 4,
        "sample_error": 4,
        "seconds_calibration": 1,
        "size_bytes": 0,
    }
    headline = "noise_error_float"

    def module(self, **arguments: Any) -> NoisePrediction:
        """Training on noise; there is no teacher to learn from."""
        if arguments.pop("objective", Objective()) != Objective():
            raise ValueError("model.objective has no effect on a DiT; remove it")
        return NoisePrediction(self, checkpoint=arguments.pop("teacher", None), **arguments)

    def calibration_batches(self, data: VisionData) -> list[Batch]:
        """Noisy images with their time steps, all spread evenly, and their classes."""
        images = torch.cat(data.calibration_batches())
        labels = data.calibration_labels()
        generator = torch.Generator().manual_seed(data.seed)
        count = len(images) * self.calibration_times
        times = self.schedule.spread(count)[torch.randperm(count, generator=generator)]
        images = images.repeat(self.calibration_times, 1, 1, 1)
        noise = torch.randn(images.shape, generator=generator)
        noisy = self.schedule.add_noise(images, noise, times)
        return [(noisy, times, labels.repeat(self.calibration_times))]

    def evaluate(
        self, model: nn.Module, data: VisionData, trainer: Trainer, folder: Path
    ) -> dict[str, Any]:
        """Noise errors and, where there is a judge, its verdict on samples."""
        found = self._look(model.to(trainer.strategy.root_device).eval(), data)
        found.save(folder / "samples.png")
        return {**found.items(), "noise_error_by_time": found.by_time(self, None)}

    def compare(
        self,
        model: nn.Module,
        original: nn.Module,
        data: VisionData,
        trainer: Trainer,
        folder: Path,
    ) -> dict[str, Any]:
        """Both models' measures, and the distance between what they predict and generate."""
        device = trainer.strategy.root_device
        exact = _remembered(self, original.to(device), data)
        found = self._look(model, data)
        found.save(folder / "samples.png")
        exact.save(folder / "samples_float.png")
        gap = found.samples - exact.samples
        items = {
            **found.items(),
            **{f"{key}_float": value for key, value in exact.items().items()},
            "noise_gap": float(found.prediction.gaps(exact.prediction).mean()),
            "sample_error": float(gap.norm() / exact.samples.norm()),
            "noise_error_by_time": found.by_time(self, exact),
        }
        if found.classes is not None and exact.classes is not None:
            items["agreement"] = float((found.classes == exact.classes).double().mean())
        return items

    def _look(self, model: nn.Module, data: VisionData) -> "Look":
        device = next(model.parameters()).device
        images, labels = (x.to(device) for x in data.evaluation_images(self.num_images))
        generator = torch.Generator().manual_seed(EVALUATION_SEED + data.seed)
        prediction = predict(model, images, labels, self.schedule, self.num_times, generator)
        asked = torch.arange(self.num_samples, device=device) % int(model.num_classes)  # type: ignore[arg-type]
        shape = (self.num_samples, *images.shape[1:])
        noise = torch.randn(shape, generator=generator).to(device)
        samples = in_parts(lambda x, y: self._sample(model, x, y), noise, asked)
        if self.judge is None:
            return Look(prediction, samples, asked, None, None)
        judge = files.load(self.judge).to(device)
        assert isinstance(judge, Judge)
        verdict = judged(judge, samples)
        truth = _seen(self.judge, judge, data)
        distance = frechet(verdict.features, truth.features)
        return Look(prediction, samples, asked, verdict.classes, distance)

    def _sample(self, model: nn.Module, noise: Tensor, labels: Tensor) -> Tensor:
        estimate = guided(model, labels, self.guidance)
        if self.sampler == "ddim":
            return ddim(estimate, noise, self.schedule, self.sampling_steps)
        generator = torch.Generator(noise.device).manual_seed(EVALUATION_SEED)
        return ddpm(estimate, noise, self.schedule, generator)


@dataclass(frozen=True)
class Look:
    """What one model predicted and generated.

    Attributes:
        prediction: Noise predictions on real images.
        samples: Generated images.
        asked: The classes that were asked for.
        classes: The classes that the judge saw; None without a judge.
        distance: Fréchet distance of its features to those of real images; None without a judge.
    """

    prediction: Prediction
    samples: Tensor
    asked: Tensor
    classes: Tensor | None
    distance: float | None

    def items(self) -> dict[str, Any]:
        """Measures of the model."""
        items: dict[str, Any] = {"noise_error": float(self.prediction.errors().mean())}
        if self.classes is not None:
            items["class_accuracy"] = float((self.classes == self.asked).double().mean())
            items["frechet"] = self.distance
        return items

    def by_time(self, task: Denoising, exact: "Look | None") -> list[dict[str, Any]]:
        """Noise errors by groups of time steps."""
        table = []
        size = task.schedule.num_steps // task.num_groups
        for first in range(0, size * task.num_groups, size):
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
        save_image(self.samples[:100] / 2 + 0.5, path, nrow=10)


_FLOAT: dict[tuple[Denoising, int, str], Look] = {}
_TRUTH: dict[str, Verdict] = {}


def _seen(path: str, judge: Judge, data: VisionData) -> Verdict:
    """What a judge sees in all real images; looked at once for all the models of a grid."""
    if path not in _TRUTH:
        images, _ = data.evaluation_images(None)
        _TRUTH[path] = judged(judge, images.to(next(judge.parameters()).device))
    return _TRUTH[path]


def _remembered(task: Denoising, original: nn.Module, data: VisionData) -> Look:
    """What the float model gives; looked at once for all the models that a grid makes of it."""
    key = (task, data.seed, files.digest(original.state_dict()))
    if key not in _FLOAT:
        _FLOAT[key] = task._look(original, data)
    return _FLOAT[key]

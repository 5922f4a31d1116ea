"""Diffusion models as a task: trained to predict noise, judged by errors and by samples."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from qat import checkpoint as files
from qat.calibrate import Batch
from qat.data.samples import LabelledBatch
from qat.diffusion.judge import Judge
from qat.diffusion.look import Look, look_at
from qat.diffusion.measure import Verdict, judged, noise_errors, noisy_copies
from qat.diffusion.sampling import ddim, ddpm, guided
from qat.diffusion.schedule import NoiseSchedule
from qat.lightning.data import VisionData
from qat.lightning.tasks import Form, Remembered, Task
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
        self.noise_error = MeanMetric(nan_strategy="disable")
        self.num_images, self.num_refused = SumMetric(), SumMetric()

    @property
    def measures(self) -> tuple[str, ...]:
        """Errors of the predicted noise."""
        return "train/loss", "val/noise_error", "val/n_images", "val/n_refused"

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Mean squared error of the predicted noise."""
        images, labels = batch
        withheld = torch.rand(len(labels), device=labels.device) < self.task.class_dropout
        labels = torch.where(withheld, self.model.num_classes, labels)  # type: ignore[call-overload]
        loss = noise_errors(self.model, images, labels, self.task.schedule).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        """The same, for noise and time steps that are the same in every epoch."""
        images, labels, faults = LabelledBatch(*batch)
        self.num_refused(len(faults))
        self.log("val/n_refused", self.num_refused)
        if not len(labels):
            return
        generator = torch.Generator().manual_seed(EVALUATION_SEED + batch_idx)
        errors = noise_errors(self.model, images, labels, self.task.schedule, generator)
        self.noise_error(errors)
        self.num_images(len(labels))
        self.log("val/noise_error", self.noise_error, prog_bar=True)
        self.log("val/n_images", self.num_images)

    def calibration_batches(self) -> Iterable[Any]:
        """Noisy images of all time steps."""
        return self.task.calibration_batches(self.trainer.datamodule)  # type: ignore[attr-defined]


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
        generator = torch.Generator().manual_seed(data.seed)
        labels = data.calibration_labels()
        return [noisy_copies(images, labels, self.schedule, self.calibration_times, generator)]

    def inputs(self, data: VisionData) -> Iterator[Batch]:
        """Noisy images, a copy of each, at time steps spread evenly."""
        images, labels = data.evaluation_images(None)
        generator = torch.Generator().manual_seed(EVALUATION_SEED + data.seed)
        yield noisy_copies(images, labels, self.schedule, 1, generator)

    def evaluate(
        self, model: nn.Module, data: VisionData, trainer: Trainer, folder: Path
    ) -> dict[str, Any]:
        """Noise errors and, where there is a judge, its verdict on samples."""
        device = trainer.strategy.root_device
        judge = self._judge(device)
        found = self._look(model.to(device).eval(), judge, data)
        found.save(folder / "samples.png")
        items = found.items(_truth(judge, data))
        return {**items, "noise_error_by_time": found.by_time(self.num_groups)}

    def compare(
        self,
        model: nn.Module,
        original: nn.Module,
        data: VisionData,
        trainer: Trainer,
        folder: Path,
        remembered: Remembered,
    ) -> dict[str, Any]:
        """Both models' measures, and the distance between what they predict and generate."""
        device = trainer.strategy.root_device
        judge = self._judge(device)
        images, labels = data.evaluation_images(None)
        real = files.digest({"images": images, "labels": labels})
        key = (self, data.seed, files.digest(original.state_dict()), real)
        exact = remembered(key, lambda: self._look(original.to(device), judge, data))
        truth = remembered((self.judge, real), lambda: _truth(judge, data))
        found = self._look(model, judge, data)
        found.save(folder / "samples.png")
        exact.save(folder / "samples_float.png")
        floats = {f"{key}_float": value for key, value in exact.items(truth).items()}
        table = found.by_time(self.num_groups, exact)
        return {
            **found.items(truth),
            **floats,
            **found.departure(exact),
            "noise_error_by_time": table,
        }

    def _judge(self, device: torch.device) -> Judge | None:
        if self.judge is None:
            return None
        judge = files.load(self.judge).to(device)
        assert isinstance(judge, Judge)
        return judge

    def _look(self, model: nn.Module, judge: Judge | None, data: VisionData) -> Look:
        device = next(model.parameters()).device
        images, labels = (x.to(device) for x in data.evaluation_images(self.num_images))
        found = look_at(
            model,
            images,
            labels,
            self.schedule,
            self._sample,
            self.num_times,
            self.num_samples,
            EVALUATION_SEED + data.seed,
        )
        return found if judge is None else replace(found, verdict=judged(judge, found.samples))

    def _sample(self, model: nn.Module, noise: Tensor, labels: Tensor) -> Tensor:
        estimate = guided(model, labels, self.guidance)
        if self.sampler == "ddim":
            return ddim(estimate, noise, self.schedule, self.sampling_steps)
        generator = torch.Generator(noise.device).manual_seed(EVALUATION_SEED)
        return ddpm(estimate, noise, self.schedule, generator)


def _truth(judge: Judge | None, data: VisionData) -> Verdict | None:
    """What a judge sees in all real images."""
    if judge is None:
        return None
    images, _ = data.evaluation_images(None)
    return judged(judge, images.to(next(judge.parameters()).device))

"""What a model is for: how it is trained, calibrated and judged. Recipes name it as `task`.

Commands know no accuracy and no noise: they ask the task for a training module, for calibration
batches, for measures, and for the columns of their tables.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pytorch_lightning import Trainer
from torch import nn

from qat.calibrate import Batch
from qat.lightning.answers import require_answers
from qat.lightning.comparison import Comparison
from qat.lightning.data import VisionData
from qat.lightning.modules import Distillation
from qat.lightning.training import Training
from qat.train.losses import Objective

Form = tuple[str, str]
"""A key of `metrics.json`, and how its value is printed."""


T = TypeVar("T")


class Remembered:
    """Results that several runs share, each under a key that says all it depends on."""

    def __init__(self) -> None:
        self._results: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result under a key, made at the first call."""
        if key not in self._results:
            self._results[key] = make()
        return self._results[key]


class Task(ABC):
    """What a model is for; subclasses are dataclasses.

    Attributes:
        monitor: Measure that picks the best checkpoint of a training run, and `min` or `max`.
        rows: What the table of one run shows, by label.
        columns: Keys that the table of many runs shows, and digits of each.
        headline: Key of the float model's result, in the title of that table.
    """

    monitor: ClassVar[tuple[str, str]]
    rows: ClassVar[Mapping[str, Form]]
    columns: ClassVar[Mapping[str, int]]
    headline: ClassVar[str]

    @abstractmethod
    def module(self, **arguments: Any) -> Training:
        """The module that trains, from the `model` section of a recipe."""

    @abstractmethod
    def calibration_batches(self, data: VisionData) -> list[Batch]:
        """What quantizers are calibrated on."""

    @abstractmethod
    def inputs(self, data: VisionData) -> Iterator[Batch]:
        """What a model is given, of the evaluation images."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, data: VisionData, trainer: Trainer, folder: Path
    ) -> dict[str, Any]:
        """Measures of one model, for `metrics.json`; files go into the run folder."""

    @abstractmethod
    def compare(
        self,
        model: nn.Module,
        original: nn.Module,
        data: VisionData,
        trainer: Trainer,
        folder: Path,
        remembered: Remembered,
    ) -> dict[str, Any]:
        """Measures of a quantized model beside the float model it came from.

        What does not depend on the quantized model may be `remembered` for the next one.
        """


@dataclass(frozen=True)
class Classification(Task):
    """Images in, classes out."""

    monitor = ("val/top1", "max")
    rows: ClassVar[Mapping[str, Form]] = {
        "top-1": ("top1", "{:.4f}"),
        "top-1, float": ("top1_float", "{:.4f}"),
        "agreement with float": ("agreement", "{:.4f}"),
        "logit error, relative": ("logit_error", "{:.4f}"),
        "evaluation images": ("n_images", "{:,}"),
        "of these refused": ("n_refused", "{:,}"),
    }
    columns: ClassVar[Mapping[str, int]] = {
        "top1": 4,
        "agreement": 4,
        "logit_error": 4,
        "seconds_calibration": 1,
    }
    headline = "top1_float"

    def module(self, **arguments: Any) -> Distillation:
        """Training on labels, on a teacher, or on both."""
        return Distillation(**arguments)

    def calibration_batches(self, data: VisionData) -> list[Batch]:
        """Preprocessed images."""
        return list(data.calibration_batches())

    def inputs(self, data: VisionData) -> Iterator[Batch]:
        """Preprocessed images."""
        return (batch[0] for batch in data.val_dataloader() if len(batch[0]))

    def evaluate(
        self, model: nn.Module, data: VisionData, trainer: Trainer, folder: Path
    ) -> dict[str, Any]:
        """Accuracy on the evaluation images."""
        module = Distillation(model, objective=Objective())
        found = trainer.validate(module, datamodule=data, verbose=False)[0]
        items = {name.removeprefix("val/"): value for name, value in found.items()}
        counts = {key: int(items[key]) for key in ("n_images", "n_refused")}
        require_answers(**counts)
        return items | counts

    def compare(
        self,
        model: nn.Module,
        original: nn.Module,
        data: VisionData,
        trainer: Trainer,
        folder: Path,
        remembered: Remembered,
    ) -> dict[str, Any]:
        """Accuracy of both models, and how far the one departs from the other."""
        comparison = Comparison(model, original, data.val.labelled)
        trainer.validate(comparison, datamodule=data, verbose=False)
        return comparison.items()

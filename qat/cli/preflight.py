"""What could not finish, or would leave less than asked for, is refused before the first step."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

from pytorch_lightning import Trainer

from qat.lightning.data import VisionData
from qat.plan import nearest

PRECISIONS = (None, 32, 16, "32", "16", "bf16", "32-true", "16-mixed", "bf16-mixed")
STRATEGIES = r"auto|ddp|ddp_find_unused_parameters_\w+|(.*\.)?(DDP|SingleDevice)Strategy"
"""Those in which every process runs the command and holds the whole model."""
Number = int | float
OURS = ("pytorch_lightning.", "qat.")
"""Packages whose callbacks are known to log nothing that is not listed."""


def require_evaluation(trainer: Any) -> None:
    """Refuse settings of a trainer under which nothing could be evaluated.

    Raises:
        ValueError: If there is a setting like that.
    """
    if trainer.precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision {trainer.precision} would keep the weights themselves in that "
            "type, in which neither quantizers nor evaluation work; use 32-true, bf16-mixed or "
            "16-mixed"
        )
    if trainer.limit_val_batches == 0:
        raise ValueError(
            "trainer.limit_val_batches 0 leaves no image to evaluate; give it 1 or more batches"
        )


def require_training(trainer: Any) -> None:
    """Refuse settings of a trainer under which nothing could be trained and kept.

    Raises:
        ValueError: If there is a setting like that.
    """
    require_evaluation(trainer)
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, key) == 0:
            raise ValueError(
                f"trainer.{key} 0 trains nothing; use the commands test or quantize for a model as "
                "it is"
            )
    if not re.fullmatch(STRATEGIES, str(getattr(trainer.strategy, "class_path", trainer.strategy))):
        raise ValueError(
            f"fit cannot keep its results under trainer.strategy {trainer.strategy}; use auto or "
            "ddp"
        )
    if trainer.enable_checkpointing is False:
        raise ValueError(
            "trainer.enable_checkpointing false would lose what fit trains; leave it out"
        )
    if trainer.max_epochs == -1 and trainer.max_steps == -1 and trainer.max_time is None:
        raise ValueError(
            "trainer.max_epochs -1 never ends; set trainer.max_steps or trainer.max_time as well"
        )


@dataclass(frozen=True)
class Schedule:
    """The batches of a training run.

    Attributes:
        batches: Batches of an epoch, in each process.
        total: Batches of the whole run.
        first_validation: Batches before the first validation; infinite where there is none.
    """

    batches: int
    total: Number
    first_validation: Number

    @staticmethod
    def of(trainer: Trainer, data: VisionData) -> "Schedule":
        """The schedule of a run that has not begun.

        Raises:
            ValueError: If an epoch, or the evaluation, would be empty.
        """
        images = len(data.train_dataloader()) * data.batch_size // trainer.world_size
        batches = _limited(images // data.batch_size, trainer.limit_train_batches, "train")
        _limited(len(data.val_dataloader()), trainer.limit_val_batches, "val")
        epochs = inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
        total = min(epochs * batches, _batches_of_steps(trainer, batches))
        return Schedule(batches, total, _first_validation(trainer, batches))

    @property
    def validates(self) -> bool:
        """Whether there is a validation before the end."""
        return self.first_validation <= self.total


def require_monitors(
    callbacks: Collection[Any], measures: Collection[str], schedule: Schedule
) -> None:
    """Refuse callbacks that wait for a measure which never comes.

    Args:
        callbacks: Callbacks of a run.
        measures: What is logged.
        schedule: When it is.

    Raises:
        ValueError: If there is a callback like that.
    """
    strangers = [c for c in callbacks if not type(c).__module__.startswith(OURS)]
    for callback in callbacks:
        name = getattr(callback, "monitor", None)
        if name is None:
            continue
        who = f"{type(callback).__name__} monitors '{name}'"
        if name not in measures and not strangers:
            raise ValueError(f"{who}, which is never logged{nearest(name, measures)}")
        if not name.startswith("train/") and not schedule.validates:
            raise ValueError(
                f"{who}, but training ends after {schedule.total:g} batches and the first "
                f"validation comes after {schedule.first_validation:g}; train longer, or lower "
                "trainer.val_check_interval"
            )


def _limited(batches: int, limit: Number | None, which: str) -> int:
    """Batches that are left under a limit, a number or a share."""
    limit = 1.0 if limit is None else limit
    left = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if not left:
        raise ValueError(
            f"trainer.limit_{which}_batches {limit} of {batches} batches leaves none; raise it, or "
            "lower data.batch_size"
        )
    return int(left)


def _batches_of_steps(trainer: Trainer, batches: int) -> Number:
    """Batches until `max_steps`; the last step of an epoch may take fewer than the others."""
    if trainer.max_steps == -1:
        return inf
    every = trainer.accumulate_grad_batches
    epochs, steps = divmod(trainer.max_steps, ceil(batches / every))
    return epochs * batches + steps * every


def _first_validation(trainer: Trainer, batches: int) -> Number:
    """Batches before the first validation; an interval of time is taken to come at once."""
    every = trainer.check_val_every_n_epoch
    interval = getattr(trainer, "val_check_interval", None)  # not there for an interval of time
    if not isinstance(interval, int | float):
        return 0
    if isinstance(interval, float):
        interval = max(1, int(batches * interval))
    return interval + (0 if every is None else (every - 1) * batches)

"""The folder a run leaves behind: resolved recipe, checkpoints, metrics.csv, metrics.json."""

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only

from qat import checkpoint as files
from qat import disk

NAME_FOR_OTHERS = "LOWBIT_RUN_DIR"


def is_first_process() -> bool:
    """True but in the further processes of a distributed run."""
    return getattr(rank_zero_only, "rank", 0) == 0


class RunFolder:
    """Paths and files of one run.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "config.yaml"
        self.metrics = self.path / "metrics.json"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"

    @staticmethod
    def named(run_dir: str | None, recipe: str) -> "RunFolder":
        """The folder a user asked for, or `runs/<recipe>-<time>`.

        In a distributed run the first process names it, and those it starts inherit the name.
        """
        if run_dir is None and is_first_process():
            os.environ[NAME_FOR_OTHERS] = f"runs/{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
        return RunFolder(run_dir or os.environ[NAME_FOR_OTHERS])

    def checkpoint_to_resume(self, ckpt_path: str | None) -> Path | None:
        """The checkpoint that `--ckpt_path` means, read once to be sure that it is whole.

        Raises:
            ValueError: If it is missing or damaged, or the folder holds a run and none is named.
        """
        if ckpt_path is None:
            if is_first_process() and (self.last.exists() or self.metrics.exists()):
                raise ValueError(
                    f"run folder '{self.path}' already holds a run; continue it with --ckpt_path "
                    "last, or choose another --run_dir"
                )
            return None
        path = self.last if ckpt_path == "last" else Path(ckpt_path)
        if ckpt_path == "last" and not path.exists():
            raise ValueError(
                f"no checkpoint to continue in '{self.path}'; name the folder of the run with "
                "--run_dir, or leave --ckpt_path out to start anew"
            )
        files.read(path)
        return path

    def logger(self, last_step: int | None) -> CSVLogger:
        """Logger of `metrics.csv`; a resumed run keeps the rows up to the step it resumes from."""
        path = self.path / "metrics.csv"
        rows: list[dict[str, Any]] = []
        if last_step is not None and path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) < last_step]
        if is_first_process():
            path.unlink(missing_ok=True)
        logger = CSVLogger(self.path, name="", version="", flush_logs_every_n_steps=10)
        if is_first_process():
            logger.experiment.metrics.extend(rows)
        return logger

    @rank_zero_only
    def write_metrics(self, items: dict[str, Any]) -> None:
        """Write `metrics.json`, atomically."""
        disk.write(self.metrics, json.dumps(items, indent=2) + "\n")

    def read_metrics(self) -> dict[str, Any]:
        """Read `metrics.json`."""
        return json.loads(self.metrics.read_text())

    def tracker_id(self) -> str:
        """Identity of this run at an experiment tracker, so that a resumed run continues it."""
        path = self.path / "tracker_id"
        if not path.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            disk.write(path, os.urandom(4).hex())
        return path.read_text()

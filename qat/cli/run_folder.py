"""The folder a run leaves behind: resolved recipe, checkpoints, metrics.csv, metrics.json."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning.utilities import rank_zero_only

from qat import checkpoint as files
from qat import disk
from qat.cli.curves import Curves, rows_before
from qat.cli.lock import locked

NAME_FOR_OTHERS = "LOWBIT_RUN_DIR"


def is_first_process() -> bool:
    """True but in the further processes of a distributed run."""
    return getattr(rank_zero_only, "rank", 0) == 0


class RunFolder:
    """Paths and files of one run.

    Args:
        path: The folder.
        is_made_up: Whether nobody asked for this name, so that the folder must be a new one.
    """

    def __init__(self, path: str | Path, is_made_up: bool = False) -> None:
        self.path, self.is_made_up = Path(path), is_made_up
        self.recipe = self.path / "config.yaml"
        self.metrics = self.path / "metrics.json"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"

    @staticmethod
    def named(run_dir: str | None, recipe: str) -> "RunFolder":
        """The folder a user asked for, or `runs/<recipe>-<time>`.

        In a distributed run the first process names it, and those it starts inherit the name.
        """
        if run_dir is not None:
            return RunFolder(run_dir)
        if is_first_process():
            return RunFolder(f"runs/{recipe}-{time.strftime('%Y%m%d-%H%M%S')}", is_made_up=True)
        return RunFolder(os.environ[NAME_FOR_OTHERS])

    @contextmanager
    def claimed(self) -> Iterator["RunFolder"]:
        """The folder, made and for this process alone within the block.

        One with a made-up name gets a further number where another run has that name. A new folder
        in which nothing is left is removed again. Of several processes the first one claims.

        Raises:
            ValueError: If another process has it, or it cannot be written.
        """
        if not is_first_process():
            yield self
            return
        with ExitStack() as stack:
            try:
                folder, is_new = self._made()
                if is_new:
                    stack.callback(_remove_if_empty, folder.path)
                stack.enter_context(locked(folder.path))
                for part in folder.path.rglob(".*.part"):  # of a process that was killed
                    part.unlink()
            except OSError as error:
                raise ValueError(
                    f"run folder '{self.path}' cannot be used ({error.strerror}); choose another "
                    "--run_dir"
                ) from None
            os.environ[NAME_FOR_OTHERS] = str(folder.path)
            yield folder

    def _made(self) -> tuple["RunFolder", bool]:
        """The folder, and whether it is new."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        further = (f"{self.path}-{number}" for number in count(2)) if self.is_made_up else ()
        for name in chain([str(self.path)], further):
            with suppress(FileExistsError):
                os.mkdir(name)
                return RunFolder(name), True
        return self, False

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

    def logger(self, last_step: int | None) -> Curves:
        """Logger of `metrics.csv`; a resumed run keeps the rows up to the step it resumes from."""
        path = self.path / "metrics.csv"
        if last_step is None or not path.exists():
            return Curves(path, [])
        return Curves(path, rows_before(path, last_step))

    @rank_zero_only
    def write_metrics(self, items: dict[str, Any]) -> None:
        """Write `metrics.json`, atomically."""
        disk.write(self.metrics, json.dumps(items, indent=2) + "\n")

    def read_metrics(self) -> dict[str, Any]:
        """Read `metrics.json`.

        Raises:
            ValueError: If it is damaged.
        """
        try:
            found = json.loads(self.metrics.read_text())
            if not isinstance(found, dict):
                raise ValueError("it holds no results by name")
            return found
        except ValueError as error:
            raise ValueError(
                f"'{self.metrics}' is damaged ({error}); restore it from a copy, or delete it to "
                "run this again"
            ) from None

    def read_recipe(self) -> dict[str, Any]:
        """Read `config.yaml`.

        Raises:
            ValueError: If it is damaged.
        """
        try:
            found = yaml.safe_load(self.recipe.read_text())
        except (ValueError, yaml.YAMLError):
            found = None
        if not isinstance(found, dict):
            raise ValueError(
                f"'{self.recipe}' is empty or damaged, so nobody knows which run this folder "
                "holds; restore it from a copy, or start anew in another --run_dir"
            )
        return found

    def tracker_id(self) -> str:
        """Identity of this run at an experiment tracker, so that a resumed run continues it."""
        path = self.path / "tracker_id"
        if not path.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            disk.write(path, os.urandom(4).hex())
        return path.read_text()


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()

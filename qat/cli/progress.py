"""The journal of a run folder: a progress bar with the time left, losses, finished stages."""

import io
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from qat import disk
from qat.journal import Journal

STAGE = "lowbit-vit-stage/1"
"""Kind of the files that finished stages are kept in, before the name of the stage."""


class RunJournal(Journal):
    """Keeps `reconstruction.csv` and the finished stages in a folder; a context manager.

    Args:
        folder: The run folder.
        console: Where progress is shown.
        resume: Skip the stages that an earlier run finished in this folder.
        waits: Show nothing until the first part begins.
    """

    def __init__(
        self, folder: Path, console: Console, *, resume: bool = False, waits: bool = False
    ) -> None:
        self.table = folder / "reconstruction.csv"
        self.stages = folder / "stages"
        self.notes: dict[str, Any] = {}
        self.resume, self.waits = resume, waits
        self.parts_left = 0
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, transient=True)
        self.task = self.progress.add_task("calibrating", total=None)
        self.rows: list[dict[str, Any]] = []
        self.finished_rows: list[dict[str, Any]] = []

    def __enter__(self) -> "RunJournal":
        if not self.waits:
            self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def note(self, key: str, value: Any) -> None:
        """Keep a fact for `metrics.json`."""
        self.notes[key] = value

    def begin(self, part: str, num_steps: int, parts_left: int) -> None:
        """Say what is being done, and how much of it there is."""
        total = num_steps * (parts_left + 1)
        self.progress.start()
        self.progress.reset(self.task, total=total, description=part)
        self.rows, self.parts_left = [], parts_left

    def step(self, part: str, step: int, losses: Mapping[str, float]) -> None:
        """Move the bar, and keep the losses."""
        self.progress.advance(self.task)
        self.rows.append({"part": part, "step": step, **losses})

    def finish(self, part: str, state: Mapping[str, Any]) -> None:
        """Write the stage with its losses, then the table."""
        self.stages.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        torch.save({"state": dict(state), "rows": self.rows}, content)
        disk.write(self._path(part), disk.seal(f"{STAGE} {part}", content.getvalue()))
        if not self.parts_left:
            self.progress.stop()
        self._tabulate(self.rows)

    def finished(self, part: str) -> Mapping[str, Any] | None:
        """The stage, if this run continues one that came so far; a damaged one is made anew."""
        path = self._path(part)
        if not self.resume or not path.exists():
            return None
        try:
            content = io.BytesIO(disk.unseal(f"{STAGE} {part}", path.read_bytes()))
        except ValueError as error:
            self.progress.console.print(f"{part} is made anew; of its file, {error}")
            return None
        found = torch.load(content, weights_only=True)
        self._tabulate(found["rows"])
        return found["state"]

    def clear(self) -> None:
        """Delete the stages: the run is complete and its checkpoint written."""
        for path in self.stages.glob("*"):
            path.unlink()
        if self.stages.exists():
            self.stages.rmdir()

    def _tabulate(self, rows: list[dict[str, Any]]) -> None:
        """Write the table anew: parts may have other losses than those before them."""
        self.finished_rows += rows
        if not self.finished_rows:
            return
        columns = dict.fromkeys(column for row in self.finished_rows for column in row)
        filled = [{column: row.get(column, "") for column in columns} for row in self.finished_rows]
        disk.write(self.table, disk.csv_of(filled, header=True))

    def _path(self, part: str) -> Path:
        return self.stages / f"{part.replace(' ', '-')}.ckpt"

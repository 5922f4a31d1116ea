"""A run as its folder tells it: whole, unfinished, or in part damaged."""

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat.cli.report.wording import Number
from qat.cli.run_folder import RunFolder
from qat.cli.tables import read_table


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: Its folder.
        name: What it is called on the page.
        metrics: Its `metrics.json`; empty where it has not ended.
        recipe: Its `config.yaml`; empty where there is none.
        faults: What cannot be read, a line each; it grows as tables are asked for.
    """

    folder: RunFolder
    name: str
    metrics: dict[str, Any]
    recipe: dict[str, Any]
    faults: list[str] = field(default_factory=list)

    @staticmethod
    def read(path: str | Path) -> "Run":
        """The run in a folder.

        Raises:
            ValueError: If there is none, or `metrics.json` or `config.yaml` is damaged.
        """
        folder = RunFolder(path)
        if not folder.path.is_dir():
            raise ValueError(f"no run folder '{path}'; name one that a command has left, runs/...")
        if not (folder.metrics.is_file() or folder.recipe.is_file()):
            raise ValueError(
                f"'{path}' is no run folder: it has neither metrics.json nor config.yaml; name the "
                "folder that a command printed at its end"
            )
        metrics = folder.read_metrics() if folder.metrics.is_file() else {}
        recipe = folder.read_recipe() if folder.recipe.is_file() else {}
        return Run(folder, folder.path.resolve().name, metrics, recipe)

    @property
    def finished(self) -> bool:
        """Whether it has ended, with results."""
        return bool(self.metrics)

    def get(self, key: str) -> Any:
        """A result, None where there is none."""
        return self.metrics.get(key)

    def numbers(self, *keys: str) -> list[Number] | None:
        """Some results, where all of them are there and numbers."""
        found = [self.metrics.get(key) for key in keys]
        return found if all(type(value) in (int, float) for value in found) else None  # type: ignore[return-value]

    def rows(self, key: str) -> list[dict[str, Any]]:
        """A table in `metrics.json`; no rows where there is none."""
        found = self.metrics.get(key)
        whole = isinstance(found, list) and all(isinstance(row, dict) for row in found)
        return found if whole else []  # type: ignore[return-value]

    def table(self, name: str) -> list[dict[str, Any]]:
        """The rows of a CSV file of the folder; none where it is not there or damaged."""
        path = self.folder.path / name
        try:
            return read_table(path) if path.is_file() else []
        except ValueError as error:
            if str(error) not in self.faults:
                self.faults.append(str(error))
            return []

    def picture(self, name: str) -> str | None:
        """A PNG file of the folder as a URI that holds all of it."""
        path = self.folder.path / name
        if not path.is_file():
            return None
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"

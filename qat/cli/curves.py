"""The curves of a training run, in `metrics.csv`."""

import csv
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from qat import disk


class Curves(Logger):
    """Logger of one table, whose columns are all that was ever logged, in alphabetical order.

    Args:
        path: The file; what another run left there stays until something is logged.
        rows: Rows of the run that this one continues.
    """

    def __init__(self, path: Path, rows: list[dict[str, Any]]) -> None:
        super().__init__()
        self.path, self.rows = path, rows
        self.columns: list[str] = []
        self.size = self.num_saved = 0

    @property
    def name(self) -> str:
        """None: there is one run in a folder."""
        return ""

    @property
    def version(self) -> str:
        """None, likewise."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the recipe is kept beside the table."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Take in a row."""
        self.rows.append({**metrics, "step": step})

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that came since; all of them where there are new columns."""
        fresh = self.rows[self.num_saved :]
        columns = sorted({*self.columns, *(key for row in fresh for key in row)})
        if columns != self.columns:
            self.columns = columns
            content = self._csv(self.rows, header=True)
            disk.write(self.path, content)
            self.size = len(content)
        elif fresh:
            self.size = disk.append(self.path, self.size, self._csv(fresh, header=False))
        self.num_saved = len(self.rows)

    def _csv(self, rows: list[dict[str, Any]], header: bool) -> bytes:
        whole = [{key: row.get(key, "") for key in self.columns} for row in rows]
        return disk.csv_of(whole, header=header)


def rows_before(path: Path, step: int) -> list[dict[str, Any]]:
    """Rows of a table up to a step; a last one that is torn is not among them.

    Raises:
        ValueError: If it is no such table.
    """
    try:
        text = path.read_text()
        rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
        return [row for row in rows if int(row["step"]) < step]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"'{path}' is damaged, so its curves cannot be continued; restore it from a copy, or "
            "delete it: all else is kept"
        ) from None

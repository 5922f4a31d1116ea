"""Tables of a run: they grow while it goes on, and are read back when it is drawn."""

import csv
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qat import disk


class GrowingTable:
    """A CSV file that grows by whole rows and knows what is in it.

    Args:
        path: The file; what another run left there is replaced at the first rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size, self.hash = 0, hashlib.sha256()

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, the columns of the first one to all; when this returns they are on the disk.

        Raises:
            OSError: If the disk fails; none of them is in the table then.
        """
        if rows:
            content = disk.csv_of(rows, header=not self.size)
            self.size = disk.append(self.path, self.size, content)
            self.hash.update(content)

    def state(self) -> dict[str, Any]:
        """What is in the table, for `resume`."""
        return {"size": self.size, "sha256": self.hash.hexdigest()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on behind what was in the table; what came after it is dropped at the next rows.

        Raises:
            ValueError: If that is no longer in it.
        """
        content = self.path.read_bytes()[: state["size"]] if self.path.exists() else b""
        found = hashlib.sha256(content)
        if found.hexdigest() != state["sha256"]:
            raise ValueError(
                f"'{self.path}' has lost rows or is damaged, so the run cannot continue; restore "
                "it from a copy, or start anew in another --run_dir"
            )
        self.size, self.hash = len(content), found


TEXT = frozenset({"layer", "module", "operand", "domain", "outcome", "reason", "digest", "part"})
"""Columns of tables that hold text; the others hold numbers."""


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table of numbers; an empty cell is None, a last row that is torn is left out.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        text = path.read_text()
        whole = io.StringIO(text[: text.rfind("\n") + 1], newline="")
        rows = list(csv.DictReader(whole, strict=True))
        return [{key: _value(key, cell) for key, cell in row.items()} for row in rows]
    except (AttributeError, TypeError, ValueError, csv.Error):
        raise ValueError(f"'{path}' is damaged, and cannot be drawn") from None


def is_table(value: Any) -> bool:
    """Whether a value of `metrics.json` is a table: a list of objects."""
    return isinstance(value, list) and any(isinstance(row, dict) for row in value)


def _value(column: str, cell: str) -> Any:
    if column in TEXT:
        return cell
    number = float(cell) if cell else math.nan
    return number if math.isfinite(number) else None

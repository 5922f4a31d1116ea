"""The ledger: every published number with the command that gives it, and how far it may move.

`benchmarks/ledger.yaml` states questions and, under each, rows: a name, a label and a command. What
runs of a row gave stands in `docs/results/ledger.jsonl`, a line a run.
"""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from qat import disk
from qat.cli.recipe import PACKAGE
from qat.documents import read_yaml
from qat.plan import nearest

ROOT = PACKAGE.parent
LEDGER, RUNS = ROOT / "benchmarks" / "ledger.yaml", ROOT / "docs" / "results" / "ledger.jsonl"


@dataclass(frozen=True)
class Row:
    """A number that can be run again.

    Attributes:
        name: What `reproduce` calls it.
        label: What its table calls it.
        command: Words after `train.py`. Several commands are joined by `&&`; they pass on files
            under `runs/`, for which `reproduce` takes its own run folder.
        measure: The key of `metrics.json` that has to stay within its band.
        least_band: The band where runs differ by less, as on one machine.
    """

    name: str
    label: str
    command: str
    measure: str
    least_band: float


@dataclass(frozen=True)
class Question:
    """A table: what it answers, and its rows.

    Attributes:
        question: Its title, as a reader would ask.
        about: Under what conditions its numbers hold.
        columns: Keys of `metrics.json`, and their headings.
        rows: Its rows.
        readme: Names of the rows that the README shows, in its order.
    """

    question: str
    about: str
    columns: Mapping[str, str]
    rows: tuple[Row, ...]
    readme: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expected:
    """What the runs of a row lead one to expect of the next.

    Attributes:
        value: Mean of the runs.
        band: Distance from it that counts as the same: the largest of two standard errors, the
            spread of the runs, and the row's least band.
    """

    value: float
    band: float

    def holds(self, value: float) -> bool:
        """Whether a value lies within the band."""
        return abs(value - self.value) <= self.band


def questions(path: Path = LEDGER) -> list[Question]:
    """The questions of a ledger.

    Raises:
        ValueError: If there is no ledger, as outside a checkout of the repository.
    """
    if not path.is_file():
        raise ValueError(f"no ledger '{path}'; its rows are run from a checkout of the repository")
    return [_question(item) for item in read_yaml(path, "ledger")]


def _question(item: dict[str, Any]) -> Question:
    first = next(iter(item["columns"]))
    rows = (
        Row(name, row["label"], row["command"], row.get("measure", first), row["band"])
        for name, row in item["rows"].items()
    )
    known: dict[str, Any] = item | {"rows": tuple(rows), "readme": tuple(item.get("readme", ()))}
    return Question(**known)


def row_named(name: str, known: list[Question]) -> tuple[Question, Row]:
    """The row of a name, and its question.

    Raises:
        ValueError: If there is none.
    """
    found = {row.name: (question, row) for question in known for row in question.rows}
    if name not in found:
        raise ValueError(f"the ledger has no row '{name}'" + nearest(name, found))
    return found[name]


def runs(path: Path = RUNS) -> list[dict[str, Any]]:
    """The recorded runs; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def expected(row: Row, recorded: list[dict[str, Any]]) -> Expected:
    """What the recorded runs of a row lead one to expect.

    Raises:
        ValueError: If none is recorded.
    """
    values = [run["measures"][row.measure] for run in recorded if run["name"] == row.name]
    if not values:
        raise ValueError(f"no run of '{row.name}' is recorded; record one with --record true")
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Expected(fmean(values), max(2 * error, max(values) - min(values), row.least_band))


def record(
    row: Row, question: Question, metrics: Mapping[str, Any], path: Path = RUNS
) -> dict[str, Any]:
    """Append a run of a row to the recorded ones."""
    keys = (*question.columns, row.measure)
    run = {
        "name": row.name,
        "command": row.command,
        **{key: metrics[key] for key in ("seed", "seconds", "processor", "torch_version")},
        "commit": commit(),
        "measures": {key: metrics[key] for key in dict.fromkeys(keys) if key in metrics},
    }
    size = path.stat().st_size if path.exists() else 0
    disk.append(path, size, f"{json.dumps(run)}\n".encode())
    return run


def commit() -> str | None:
    """The commit of the checkout, marked where files differ from it; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or None

"""Jobs of a benchmark that takes hours: each is one line of a file of rows, and done once.

A runner says what the phases are and how a job becomes a row; a phase starts when the one before is
complete. The command continues where it stopped, and several processes share the jobs by claims in
a cache folder. A job that diverges or takes too long leaves a `.failed` file there and no row.
"""

import argparse
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import binaryvit_data as data
import torch
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


class Job(Protocol):
    """What a runner does; its row has `stage`, `arm` and `seed`."""

    @property
    def name(self) -> str:
        """`<stage>-<arm>-s<seed>`, what `--job` takes."""
        ...


J = TypeVar("J", bound=Job)


def name_of(row: Row) -> str:
    """Name of the job of a row."""
    return f"{row['stage']}-{row['arm']}-s{row['seed']}"


def work(
    phases: Callable[[list[Row], set[str]], list[list[J]]],
    train: Callable[[J, Path], Row],
    given: argparse.Namespace,
) -> None:
    """Do jobs until none is left; wait where others hold the last ones of a phase.

    Args:
        phases: From rows, and names of what is done, to the jobs of every phase known so far.
        train: From a job and the cache folder to its row.
        given: From `arguments`.
    """
    torch.set_num_threads(1)
    given.cache.mkdir(parents=True, exist_ok=True)
    _require_data(given.cache)
    while True:
        rows = read(given.rows)
        names = {name_of(row) for row in rows}
        failed = {file.stem for file in given.cache.glob("*.failed")}
        known = [job for jobs in phases(rows, names | failed) for job in jobs]
        left = [job for job in known if job.name not in names | failed]
        if given.job is not None:
            left = [job for job in known if job.name == given.job]
            if not left or given.job in names:
                raise SystemExit(f"{given.job} has a row already, or no phase that started has it")
        if not left:
            return
        job = next((job for job in left if _claim(given.cache, job.name)), None)
        if job is None:
            time.sleep(20)
            continue
        claim = given.cache / f"{job.name}.claim"
        if job.name not in {name_of(row) for row in read(given.rows)}:  # nobody did it meanwhile
            try:
                append(given.rows, train(job, given.cache))
            except (ArithmeticError, TimeoutError) as error:
                claim.with_suffix(".failed").write_text(str(error))
        torch.compiler.reset()
        claim.unlink()
        if given.once or given.job is not None:
            return


def main(
    about: str | None,
    name: str,
    phases: Callable[[list[Row], set[str]], list[list[J]]],
    train: Callable[[J, Path], Row],
    table: Callable[[list[Row]], Table],
) -> None:
    """A runner: its docstring, the name of its rows, its jobs, and how its rows are shown."""
    given = arguments(about, name).parse_args()
    if given.table:
        Console().print(table(read(given.rows)))
        return
    work(phases, train, given)


def arguments(about: str | None, name: str) -> argparse.ArgumentParser:
    """Arguments of a runner, by its docstring and the name of its rows."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rows", type=Path, default=f"docs/results/{name}.jsonl")
    parser.add_argument("--cache", type=Path, default=f"runs/{name}")
    parser.add_argument("--job", help="this one only, by its name")
    parser.add_argument("--once", action="store_true", help="end after one job")
    parser.add_argument("--table", action="store_true", help="print the rows and do nothing else")
    return parser


def complete(jobs: Sequence[Job], finished: set[str]) -> bool:
    """Whether a phase is over."""
    return all(job.name in finished for job in jobs)


def read(path: Path) -> list[Row]:
    """The rows written so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: Row) -> None:
    """Add a row by one write, so that two processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    os.write(handle, (json.dumps(row) + "\n").encode())
    os.fsync(handle)
    os.close(handle)


def _require_data(cache: Path) -> None:
    """Make the data, or wait for whoever makes them."""
    while not (cache / "data.pt").exists():
        if not _claim(cache, "data"):
            time.sleep(10)
        elif not (cache / "data.pt").exists():
            data.make(cache / "data.pt")
            (cache / "data.claim").unlink()


def _claim(cache: Path, name: str) -> bool:
    """Take a job, unless a living process has it."""
    claim = cache / f"{name}.claim"
    with _alone(cache):
        if claim.exists() and not Path(f"/proc/{claim.read_text() or None}").exists():
            claim.unlink()
        try:
            handle = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        os.write(handle, str(os.getpid()).encode())
        os.close(handle)
    return True


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """One process at a time looks at claims."""
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

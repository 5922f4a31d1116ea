"""Grids of recipes: a choice of each axis is laid over a recipe and run, for every combination.

An axis is a list of recipe files, whose names are those of its choices, or settings by name:

    grid:
      bits: {w4a4: {model: {plan: w4a4}}, w3a3: {model: {plan: w3a3}}}
      method: [parts/repq.yaml, parts/mgrq.yaml]
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from qat.cli.console import console
from qat.cli.recipe import Part, load_recipe
from qat.cli.run_folder import RunFolder
from qat.cli.session import Session
from qat.cli.tables import is_table

Axis = list[str] | Mapping[str, Part]


def choices(grid: Mapping[str, Axis]) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Every combination of one choice of each axis: their names by axis, and their recipe."""
    axes = [named(axis).items() for axis in grid.values()]
    for chosen in product(*axes):
        names = {axis: name for axis, (name, _) in zip(grid, chosen, strict=True)}
        yield names, load_recipe(*(part for _, part in chosen))


def named(axis: Axis) -> Mapping[str, Part]:
    """The choices of an axis by their names.

    Raises:
        ValueError: If two files of a list have one name.
    """
    if isinstance(axis, Mapping):
        return axis
    found = {Path(path).stem: path for path in axis}
    if len(found) < len(axis):
        raise ValueError(
            f"two choices of a grid have one name: {', '.join(axis)}; name them, such as "
            f"{{first: {axis[0]}}}"
        )
    return found


def run_grid(
    session: Session, run_one: Callable[[Session], None]
) -> Iterator[list[dict[str, Any]]]:
    """Run every choice, each into a folder of its own; those that are done stay.

    Yields:
        After each run the rows so far: names of the choice, and what the run measured.
    """
    if session.config.draws < 1:
        raise ValueError(f"draws must be at least 1, got {session.config.draws}")
    rows: list[dict[str, Any]] = []
    one = session.changed({"grid": None})
    # All choices are read before the first one runs, since a mistake in the last costs hours.
    every = [(names, one.overlaid(recipe)) for names, recipe in choices(session.config.grid)]
    for names, chosen in every:
        for seed in range(session.seed, session.seed + session.config.draws):
            folder = RunFolder(session.folder.path / "-".join([*names.values(), str(seed)]))
            if not folder.metrics.exists():
                console.rule(" ".join([*names.values(), f"seed {seed}"]))
                run_one(chosen.changed({"seed_everything": seed}).inside(folder))
            measured = {k: x for k, x in folder.read_metrics().items() if not is_table(x)}
            rows.append({**names, **measured, **names})
            yield rows


def continuing(session: Session) -> Session:
    """The session, which continues the run of its folder where there is one, and only there."""
    if session.folder.recipe.exists():
        return session.changed({"ckpt_path": "last"})
    return session.changed({"ckpt_path": None}) if session.config.ckpt_path == "last" else session


def grid_table(
    title: str, rows: list[dict[str, Any]], keys: list[str], columns: Mapping[str, int]
) -> Table:
    """A row for each choice of the grid: mean over its draws, and standard deviation.

    Args:
        title: Title of the table.
        rows: Names and measurements of each run.
        keys: Axes of the grid.
        columns: What was measured, and digits to show; one or none goes without deviation.
    """
    table = Table(title=title, title_justify="left")
    for heading in (*keys, "draws", *columns):
        table.add_column(heading, overflow="fold")  # a cell cut short would lose its digits
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for names, group in groups.items():
        cells = []
        for column, digits in columns.items():
            values = [row[column] for row in group if row.get(column) is not None]
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 and digits > 1 else ""
            cells.append(f"{mean(values):,.{digits}f}{spread}" if values else "-")
        table.add_row(*names, str(len(group)), *cells)
    return table

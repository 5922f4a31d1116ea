"""Grids of recipes: every choice of one file of each list is laid over a recipe and run."""

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser
from rich.table import Table

from qat.cli.commands.common import console
from qat.cli.recipe import load_recipe
from qat.cli.run_folder import RunFolder

RunOne = Callable[[Namespace, RunFolder], None]


def add_grid_argument(parser: LightningArgumentParser) -> None:
    """The argument of a command that goes through a grid of recipes."""
    parser.add_argument(
        "--grid",
        type=dict[str, list[str]] | None,
        default=None,
        help="Lists of recipe files; every choice of one of each is laid over the recipe and run.",
    )


def add_grid_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of a command that compares recipes."""
    add_grid_argument(parser)
    parser.add_argument("--draws", type=int, default=1, help="Seeds of each choice of the grid.")


def choices(grid: dict[str, list[str]]) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    """Every choice of one file of each list: the names of the files by key, and their paths."""
    for paths in product(*grid.values()):
        yield {key: Path(path).stem for key, path in zip(grid, paths, strict=True)}, paths


def overlay(
    parser: LightningArgumentParser, config: Namespace, paths: tuple[str, ...], seed: int
) -> Namespace:
    """The configuration with further recipe files, of which later ones win, laid over it."""
    overlaid = config.clone()
    overlaid.grid, overlaid.seed_everything = None, seed
    return parser.parse_object(load_recipe(*paths), overlaid)


def continuing(config: Namespace, folder: RunFolder) -> Namespace:
    """The configuration, which continues the run of the folder where there is one."""
    if folder.recipe.exists():
        config.ckpt_path = "last"
    return config


def run_grid(
    parser: LightningArgumentParser, config: Namespace, folder: RunFolder, run_one: RunOne
) -> Iterator[list[dict[str, Any]]]:
    """Run every choice, each into a folder of its own; those that are done stay.

    Yields:
        After each run the rows so far: names of the choice, and what the run measured.
    """
    rows: list[dict[str, Any]] = []
    for names, paths in choices(config.grid):
        for seed in range(config.seed_everything, config.seed_everything + config.draws):
            chosen = RunFolder(folder.path / "-".join([*names.values(), str(seed)]))
            if not chosen.metrics.exists():
                console.rule(" ".join([*names.values(), f"seed {seed}"]))
                run_one(overlay(parser, config, paths, seed), chosen)
            rows.append({**names, **chosen.read_metrics(), **names})
            yield rows


def grid_table(
    title: str, rows: list[dict[str, Any]], keys: list[str], columns: Mapping[str, int]
) -> Table:
    """A row for each choice of the grid: mean over its draws, and standard deviation.

    Args:
        title: Title of the table.
        rows: Names and measurements of each run.
        keys: Lists of the grid.
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
            values = [row[column] for row in group if column in row]
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 and digits > 1 else ""
            cells.append(f"{mean(values):,.{digits}f}{spread}" if values else "-")
        table.add_row(*names, str(len(group)), *cells)
    return table

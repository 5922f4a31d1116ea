"""Several runs in one table: what they measured, and the settings in which they differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from qat.cli.report.cards import MEASURES
from qat.cli.report.parts import Note, Part, Section, Table
from qat.cli.report.run import Run
from qat.cli.report.wording import count, duration, percent, plain, size

COSTS = {
    "size_bytes": ("Size", size),
    "bops": ("BOPs an image", count),
    "coverage_macs": ("Below 16 bits, of MACs", percent),
    "seconds": ("Run time", duration),
}
MOST_SETTINGS = 40
WITHOUT_EFFECT = ("ckpt_path", "run_dir", "config")


def side_by_side(runs: Sequence[Run]) -> Section:
    """A column for each run."""
    columns = ["", *(run.name for run in runs)]
    results = [
        [label, *(form(found[0]) if (found := run.numbers(key)) else "–" for run in runs)]
        for key, (label, form) in {**MEASURES, **COSTS}.items()
        if any(run.numbers(key) for run in runs)
    ]
    differing = _differing(runs)
    words = "What the runs measured, and below it the settings in which their recipes differ."
    parts: list[Part] = [
        Table(columns, [["Command", *(plain(run.get("command")) for run in runs)], *results])
    ]
    if differing:
        parts.append(Table(["Setting", *columns[1:]], differing[:MOST_SETTINGS], numeric=False))
    if (left := len(differing) - MOST_SETTINGS) > 0:
        parts.append(Note(f"{left} further settings differ; the folders' config.yaml have them."))
    return Section("Runs side by side", words, parts)


def _differing(runs: Sequence[Run]) -> list[list[str]]:
    """Settings that are not the same in all recipes, with the value of each."""
    flat = [dict(_flat(run.recipe)) for run in runs]
    keys = [key for key in dict.fromkeys(key for recipe in flat for key in recipe)]
    return [
        [_short(key), *(plain(recipe.get(key)) for recipe in flat)]
        for key in keys
        if key not in WITHOUT_EFFECT and len({str(recipe.get(key)) for recipe in flat}) > 1
    ]


def _short(key: str) -> str:
    """A key without the words that say how a recipe names classes."""
    return key.replace(".init_args", "").replace(".class_path", "")


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """The leaves of a recipe by their dotted keys."""
    if isinstance(value, Mapping) and value:
        paths = ((f"{path}.{key}".lstrip("."), part) for key, part in value.items())
        return [leaf for below, part in paths for leaf in _flat(part, below)]
    return [(path, value)]

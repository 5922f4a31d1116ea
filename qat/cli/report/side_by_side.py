"""Several runs in one table: what they measured, and the settings in which they differ."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qat.cli.report.cards import MEASURES
from qat.cli.report.parts import Section, Table
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
    left = len(differing) - MOST_SETTINGS
    words = "What the runs measured, and below it the settings in which their recipes differ" + (
        f"; {left} further ones are in the folders' config.yaml." if left > 0 else "."
    )
    commands = ["Command", *(plain(run.get("command")) for run in runs)]
    parts = [Table(columns, [commands, *results])]
    if differing:
        parts.append(Table(["Setting", *columns[1:]], differing[:MOST_SETTINGS], num_words=None))
    return Section("Runs side by side", words, parts)


def _differing(runs: Sequence[Run]) -> list[list[str]]:
    """Settings that are not the same in all recipes, with the value of each."""
    flat = [dict(_flat(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for recipe in flat for key in recipe)
    values = {key: [plain(recipe.get(key)) for recipe in flat] for key in keys}
    differ = {key: row for key, row in values.items() if len(set(row)) > 1}
    return [
        [key, *row]
        for key, row in differ.items()
        if key not in WITHOUT_EFFECT and _comparable(key, runs) and not _above(key) & differ.keys()
    ]


def _comparable(key: str, runs: Sequence[Run]) -> bool:
    """Whether every recipe has the section of a setting; commands have different ones."""
    return all(key.partition(".")[0] in run.recipe for run in runs if run.recipe)


def _above(key: str) -> set[str]:
    """Settings whose argument a setting is; arguments of different classes are no difference."""
    parts = key.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a recipe by their dotted keys; a class is a leaf, and its arguments others."""
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    if "class_path" in value:
        yield path, value["class_path"]
        value = value.get("init_args") or {}
    for key, part in value.items():
        yield from _flat(part, f"{path}.{key}".lstrip("."))

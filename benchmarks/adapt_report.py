"""Lines of `benchmarks/adapt.py` as a page: means over seeds, gains of TTAQ, losses by corruption.

    python benchmarks/adapt_report.py runs/tta.jsonl docs/results/tta_cifar10.md

Models are named WIDTH-CALIBRATION. Every figure is a mean over seeds ± the standard deviation
between them; a difference is taken seed by seed, on the same images in the same order.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from textwrap import fill
from typing import Any

Row = dict[str, Any]
Parts = dict[str, list[Row]]
Cells = dict[tuple[str, int], Parts]


def spread(values: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Mean ± deviation."""
    shown = f"{mean(values):{sign}.{digits}f}"
    return f"{shown} ± {stdev(values):.{digits}f}" if len(values) > 1 else shown


def points(rows: Iterable[Row], key: str) -> list[float]:
    """A rate of each row in percent."""
    return [100 * row[key] for row in rows]


def by_seed(rows: Iterable[Row]) -> dict[int, Row]:
    return {row["seed"]: row for row in rows}


def less(rows: Sequence[Row], others: Sequence[Row]) -> str:
    """What the first rows err less than the others, in points, over the seeds that both have."""
    first, second = by_seed(rows), by_seed(others)
    common = sorted(first.keys() & second.keys())
    if not common:
        return ""
    return spread(
        [100 * (second[s]["error_mean"] - first[s]["error_mean"]) for s in common], 1, "+"
    )


def loss_over_seeds(rows: Sequence[Row]) -> tuple[float, str]:
    """Largest loss on a corruption against no adaptation, over all images of all seeds."""
    losses: dict[str, list[float]] = {}
    for row in rows:
        for found in row["table"]:
            losses.setdefault(found["corruption"], []).append(
                100 * (found["error"] - found["error_source"])
            )
    worst = max(losses, key=lambda name: mean(losses[name]))
    return mean(losses[worst]), worst


def unadapted_of(parts: Parts) -> list[Row]:
    """One row of each seed, for the figures of the model left alone."""
    return list(by_seed(row for found in parts.values() for row in found).values())


def gains_of(rows: Iterable[Row]) -> list[float]:
    """What each row errs less than the model left alone, in points."""
    return [100 * (row["error_source_mean"] - row["error_mean"]) for row in rows]


def glance(cells: Cells, images: int) -> Iterable[str]:
    """The gain of every method on every model at one number of images."""
    models = {model: cells[model, number] for model, number in sorted(cells) if number == images}
    names = dict.fromkeys(name for parts in models.values() for name in parts)
    yield f"\n{images} images a corruption:\n"
    yield f"| | {' | '.join(models)} |"
    yield "|---|" + "---:|" * len(models)
    errors = (mean(points(unadapted_of(parts), "error_source_mean")) for parts in models.values())
    yield f"| *none, error* | {' | '.join(f'*{error:.1f}*' for error in errors)} |"
    for name in names:
        gains = (gains_of(parts.get(name, [])) for parts in models.values())
        yield f"| {name} | {' | '.join(f'{mean(gain):+.1f}' if gain else '' for gain in gains)} |"


def cells_of(rows: Iterable[Row]) -> Cells:
    """Rows by model and number of images, then by method."""
    cells: Cells = {}
    for row in rows:
        parts = cells.setdefault((row["model"], row["num_images"]), {})
        parts.setdefault(row["part"], []).append(row)
    return cells


def lines_of(cells: Cells, base: str) -> Iterable[str]:
    """The tables of one stream, one for each model and number of images."""
    for (model, images), parts in cells.items():
        unadapted = unadapted_of(parts)
        source = spread(points(unadapted, "error_source_mean"))
        ece = spread(points(unadapted, "ece_source_mean"))
        yield (
            f"\n**{model}**, {images} images a corruption, without adaptation: "
            f"error {source}, calibration error {ece}.\n"
        )
        yield f"| method | seeds | error | gain over none | over the method alone | over {base} + "
        yield "method | largest loss, corruption | class error | calibration error | "
        yield (
            "images backward, % | time | memory | resets |\n|---|"
            + "---:|" * 5
            + "---|"
            + "---:|" * 6
        )
        other = cells.get((f"{model.partition('-')[0]}-{base}", images), {})
        for part, found in parts.items():
            plain = part.removeprefix("ttaq_").removesuffix("+guarded")
            alone = parts.get(plain, []) if plain != part else []
            based = other.get(plain, []) if other is not parts or plain != part else []
            loss, where = loss_over_seeds(found)
            times = [row["seconds_ratio"] for row in found if row["seconds_ratio"] is not None]
            memory = [row["memory_ratio"] for row in found if "memory_ratio" in row]
            yield (
                f"| {part} | {len(found)} | {spread(points(found, 'error_mean'))} | "
                f"{spread(gains_of(found), 1, '+')} | {less(found, alone)} | "
                f"{less(found, based)} | "
                f"{loss:+.1f} {where} | {mean(points(found, 'error_class_mean')):.1f} | "
                f"{mean(points(found, 'ece_mean')):.1f} | "
                f"{mean(100 * row['n_backward'] / row['n_images'] for row in found):.0f} | "
                f"{spread(times, 2) if times else ''} | "
                f"{f'{mean(memory):.1f}' if memory else ''} | "
                f"{mean(row['n_reset'] for row in found):.1f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lines", type=Path, nargs="+")
    parser.add_argument("page", type=Path)
    parser.add_argument("--title", default="Test-time adaptation")
    parser.add_argument("--note", default="Errors in percent, gains and losses in points.")
    parser.add_argument("--base", default="PTQ", help="what follows WIDTH- in the name of a model")
    given = parser.parse_args()
    rows = [json.loads(line) for file in given.lines for line in file.read_text().splitlines()]
    text = f"# {given.title}\n\n{fill(given.note, 170)}\n"
    for stream in dict.fromkeys(row["stream"] for row in rows):
        text += f"\n## {stream.replace('_', ' ').capitalize()}\n"
        cells = cells_of(row for row in rows if row["stream"] == stream)
        sizes = sorted({images for _, images in cells}, reverse=True)
        text += "\nGain over no adaptation, points.\n"
        for line in chain(
            *(glance(cells, images) for images in sizes), lines_of(cells, given.base)
        ):
            text += line if line.endswith(" ") else f"{line}\n"
    given.page.write_text(text)


if __name__ == "__main__":
    main()

"""Lines of `benchmarks/adapt.py` as a page: means over seeds, gains of TTAQ, losses by corruption.

    python benchmarks/adapt_report.py runs/tta.jsonl docs/results/tta_cifar10.md

Models are named WIDTH-CALIBRATION. Every figure is a mean over seeds ± the standard deviation
between them; a difference is taken seed by seed, on the same images in the same order.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]


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


def lines_of(rows: list[Row], base: str) -> Iterable[str]:
    """The tables of one stream, one for each model and number of images."""
    cells: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in rows:
        parts = cells.setdefault((row["model"], row["num_images"]), {})
        parts.setdefault(row["part"], []).append(row)
    for (model, images), parts in cells.items():
        unadapted = list(by_seed(row for found in parts.values() for row in found).values())
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
            gains = [100 * (row["error_source_mean"] - row["error_mean"]) for row in found]
            times = [row["seconds_ratio"] for row in found if row["seconds_ratio"] is not None]
            memory = [row["memory_ratio"] for row in found if "memory_ratio" in row]
            yield (
                f"| {part} | {len(found)} | {spread(points(found, 'error_mean'))} | "
                f"{spread(gains, 1, '+')} | {less(found, alone)} | {less(found, based)} | "
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
    text = f"# {given.title}\n\n{given.note}\n"
    for stream in dict.fromkeys(row["stream"] for row in rows):
        text += f"\n## {stream.replace('_', ' ').capitalize()}\n"
        for line in lines_of([row for row in rows if row["stream"] == stream], given.base):
            text += line if line.endswith(" ") else f"{line}\n"
    given.page.write_text(text)


if __name__ == "__main__":
    main()

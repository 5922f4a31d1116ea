"""Lines of `benchmarks/adapt.py` as a page: means over seeds, gains of TTAQ, losses by corruption.

    python benchmarks/adapt_report.py runs/tta.jsonl docs/results/tta_cifar10.md

Every figure is a mean over seeds ± the standard deviation between them; a difference is taken seed
by seed, on the same images in the same order.
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


def lines_of(rows: list[Row]) -> Iterable[str]:
    """The tables of one stream, one for each model."""
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        parts = {
            p: [r for r in own if r["part"] == p] for p in dict.fromkeys(r["part"] for r in own)
        }
        for images in sorted({row["num_images"] for row in own}):
            shown = {
                p: [r for r in found if r["num_images"] == images] for p, found in parts.items()
            }
            shown = {p: found for p, found in shown.items() if found}
            unadapted = by_seed(row for found in shown.values() for row in found)
            source = spread(points(unadapted.values(), "error_source_mean"))
            ece = spread(points(unadapted.values(), "ece_source_mean"))
            yield (
                f"\n**{model}**, {images} images a corruption, without adaptation: "
                f"error {source}, calibration error {ece}.\n"
            )
            yield (
                "| method | seeds | error | gain over none | gain over the method alone | "
                "largest loss, corruption | class error | calibration error | "
                "images backward, % | time | resets |"
            )
            yield "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|"
            for part, found in shown.items():
                gain = spread(
                    [100 * (r["error_source_mean"] - r["error_mean"]) for r in found], 1, "+"
                )
                plain = part.removeprefix("ttaq_").removesuffix("+guarded")
                alone = shown.get(plain, []) if plain != part else []
                loss, where = loss_over_seeds(found)
                backward = mean(100 * row["n_backward"] / row["n_images"] for row in found)
                yield (
                    f"| {part} | {len(found)} | {spread(points(found, 'error_mean'))} | {gain} | "
                    f"{less(found, alone)} | {loss:+.1f} {where} | "
                    f"{mean(points(found, 'error_class_mean')):.1f} | "
                    f"{mean(points(found, 'ece_mean')):.1f} | {backward:.0f} | "
                    f"{spread([row['seconds_ratio'] for row in found], 2)} | "
                    f"{mean(row['n_reset'] for row in found):.1f} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lines", type=Path, nargs="+")
    parser.add_argument("page", type=Path)
    parser.add_argument("--title", default="Test-time adaptation")
    given = parser.parse_args()
    rows = [json.loads(line) for file in given.lines for line in file.read_text().splitlines()]
    page = [f"# {given.title}\n", "Errors in percent, gains and losses in points, severity 5."]
    for stream in dict.fromkeys(row["stream"] for row in rows):
        page.append(f"\n## {stream}")
        page.extend(lines_of([row for row in rows if row["stream"] == stream]))
    given.page.write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()

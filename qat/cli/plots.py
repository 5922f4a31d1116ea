"""Pictures of runs: sensitivities and frontier of a search, the error over a stream."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qat import disk
from qat.quantizers.slots import Slot
from qat.search.allocate import Frontier
from qat.search.sensitivity import Table

UNITS = {"bops": "BOPs of an image", "size_bytes": "bytes", "seconds": "seconds an image"}
SMOOTHING = 0.2
"""Share of a batch in the running error that is drawn."""


def sensitivity_plot(table: Table, chosen: Mapping[Slot, int], bits: int, path: Path) -> None:
    """Omega of every operand at one width, and the bits that it was given."""
    figure = Figure(figsize=(0.17 * len(table) + 2, 6.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for operand in dict.fromkeys(slot.operand for slot in table):
        at = [i for i, slot in enumerate(table) if slot.operand is operand]
        rows = [table[slot] for slot in table if slot.operand is operand]
        upper.plot(at, [_near(row, bits) for row in rows], "o", ms=4, label=str(operand))
        found = [chosen[slot] for slot in table if slot.operand is operand]
        lower.plot(at, found, "s", ms=4)
    upper.set_yscale("log")
    upper.set_ylabel(f"sensitivity at {bits} bits")
    upper.legend(ncols=6, fontsize=8)
    lower.set_ylabel("bits chosen")
    lower.set_ylim(0.5, 8.5)
    lower.set_xticks(range(len(table)), [str(slot) for slot in table], rotation=90, fontsize=6)
    _save(figure, path)


def frontier_plot(
    frontier: Frontier,
    hull: Frontier,
    constant: float,
    point: tuple[float, float],
    measure: str,
    path: Path,
) -> None:
    """Loss against cost, with the Lagrangian hull and the chosen point."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Axes = figure.subplots()
    axes.plot(frontier.costs + constant, _positive(frontier.losses), "-", label="Pareto frontier")
    axes.plot(hull.costs + constant, _positive(hull.losses), ".", ms=3, label="Lagrangian hull")
    axes.plot([point[0] + constant], [point[1]], "r*", ms=12, label="chosen")
    axes.set_yscale("log")
    axes.set_xlabel(UNITS[measure])
    axes.set_ylabel("loss: sum of sensitivities")
    axes.legend()
    _save(figure, path)


def stream_plot(table: Path, picture: Path) -> None:
    """Draw the error over a stream, with and without adaptation.

    Args:
        table: The `stream.csv` of a run.
        picture: The PNG file that is written.
    """
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="batch", ylabel="error, running mean", ylim=(0, 1))
    for key, label in (("error_source", "not adapted"), ("error", "adapted")):
        axes.plot(_smooth([float(row[key]) for row in rows]), label=label)
    starts = [i for i, row in enumerate(rows) if not i or row["domain"] != rows[i - 1]["domain"]]
    if len(starts) <= 40:
        for start in starts:
            axes.axvline(start, color="0.85", zorder=0)
            axes.text(start, 1.01, rows[start]["domain"][:18], rotation=40, fontsize=6)
    resets = [int(row["position"]) for row in rows if row["outcome"] == "reset"]
    if resets:
        axes.vlines(resets, 0, 1, color="red", linestyle=":", linewidth=1, label="reset")
    figure.legend(loc="outside lower right", ncols=3)
    _save(figure, picture)


def _near(row: Mapping[int, float], bits: int) -> float:
    return max(row[min(row, key=lambda width: abs(width - bits))], 1e-30)


def _positive(values: np.ndarray) -> np.ndarray:
    return np.maximum(values, 1e-30)


def _save(figure: Figure, path: Path) -> None:
    with disk.replacing(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def _smooth(values: list[float]) -> list[float]:
    smooth: list[float] = []
    for value in values:
        last = smooth[-1] if smooth else value
        smooth.append(last + SMOOTHING * (value - last))
    return smooth

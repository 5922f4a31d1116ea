"""Pictures of a run."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed
from matplotlib.figure import Figure

SMOOTHING = 0.2
"""Share of a batch in the running error that is drawn."""


def plot_stream(table: Path, picture: Path) -> None:
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
    for row in rows:
        if row["outcome"] == "reset":
            axes.axvline(int(row["position"]), color="red", linestyle=":", linewidth=1)
    axes.legend(loc="lower right")
    figure.savefig(picture, dpi=120)


def _smooth(values: list[float]) -> list[float]:
    smooth: list[float] = []
    for value in values:
        last = smooth[-1] if smooth else value
        smooth.append(last + SMOOTHING * (value - last))
    return smooth

"""Draws the figures of docs/methods/ from the code of the methods.

python benchmarks/figures.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch

from binaryvit.grs import BoundaryPull, DistancePull, SignPull
from qat import Operand, QuantSpec
from qat.quantizers import Log2, LogSqrt2, TanQ

FOLDER = Path(__file__).parents[1] / "docs" / "methods"
GREY = "0.5"  # is read on a light and on a dark page
PULLS = {
    "G1 DistancePull": DistancePull(),
    "G2 SignPull": SignPull(),
    "G3 BoundaryPull": BoundaryPull(),
}


def levels(axes: plt.Axes) -> None:
    """The levels of 4-bit grids for attention maps, a row each."""
    spec = QuantSpec(4, signed=False)
    grids = {"uniform": torch.linspace(0, 1, 16)}
    for grid in (Log2, LogSqrt2, TanQ):
        grids[grid.__name__] = grid(spec, (197, 197), Operand.ATTENTION).levels()
    for row, values in enumerate(grids.values()):
        axes.eventplot([values.tolist()], lineoffsets=[-row], linelengths=0.6, linewidths=1.5)
    axes.set_yticks([-row for row in range(len(grids))], list(grids))
    axes.set_xlabel("value, in units of the scale")


def pulls(axes: plt.Axes) -> None:
    """How far and in which direction descent along each form moves a latent weight."""
    w = torch.linspace(-2, 2, 801)[:, None]
    for name, pull in PULLS.items():
        axes.plot(w[:, 0], -pull.direction(w, torch.ones(1)).squeeze(), label=name)
    for place in (-1, 0, 1):
        axes.axvline(place, color=GREY, linewidth=0.7, linestyle=":")
    axes.set_xlabel("latent weight, in units of its row's mean magnitude k")
    axes.set_ylabel("pull")
    axes.legend(frameon=False, labelcolor=GREY, loc="upper left", bbox_to_anchor=(1, 1))


def main() -> None:
    """Write every figure."""
    grey = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), GREY)
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "lowbit-vit", "font.size": 11, **grey}
    plt.rcParams |= {"axes.edgecolor": GREY, "axes.spines.top": False, "axes.spines.right": False}
    for name, draw in {"levels": levels, "grs": pulls}.items():
        figure, axes = plt.subplots(figsize=(7.2, 2.8), layout="constrained")
        draw(axes)
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, transparent=True)


if __name__ == "__main__":
    main()

"""Draws docs/pictures/ptq.svg from a run of `train.py quantize --config ptq/overview`.

python benchmarks/picture.py RUN
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "ptq.svg"
METHODS = {
    "mgrq": ("MGRQ: trains block by block, minutes", "#0b5fa5", 2.6),
    "repq": ("RepQ-ViT: rescales layers, seconds", "#d95f02", 2.0),
    "mse": ("range of least error", "#7a7a7a", 1.4),
    "minmax": ("range from smallest to largest", "#b0b0b0", 1.4),
}
"""Label, colour and width of each method's line."""
BITS = {"w8a8": "8 bits", "w6a6": "6 bits", "w4a4": "4 bits", "w3a3": "3 bits"}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A line a method over bits, and the float model above them."""
    plt.rcParams |= {"svg.hashsalt": "lowbit-vit", "font.size": 11}
    figure, axes = plt.subplots(figsize=(8, 3.9), layout="constrained")
    _line_of_float(axes, rows[0]["top1_float"])
    for name, (label, colour, width) in METHODS.items():
        found = {row["bits"]: row["top1"] for row in rows if row["method"] == name}
        points = [found[bits] for bits in BITS]
        axes.plot(range(len(BITS)), points, "o-", color=colour, lw=width, ms=3 + width, label=label)
    axes.set_title(
        "Photos that a vision transformer still names right", loc="left", fontsize=13, pad=12
    )
    axes.set_xticks(range(len(BITS)), BITS.values())
    axes.set_xlabel("for every weight and activation")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower left", title="how the integers' ranges are set")
    axes.get_legend().set_alignment("left")  # type: ignore[union-attr]
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def _line_of_float(axes: Axes, top1: float) -> None:
    axes.axhline(top1, color="0.3", linestyle=(0, (4, 3)), linewidth=1.2)
    end = (len(BITS) - 1, top1)
    text = f"32-bit float, {top1:.0%}"
    axes.annotate(text, end, (0, 5), textcoords="offset points", ha="right", color="0.3")


if __name__ == "__main__":
    draw(json.loads((Path(sys.argv[1]) / "metrics.json").read_text())["table"], PICTURE)

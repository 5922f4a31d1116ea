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

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "ptq.svg"
NAMES = {
    "mgrq": "MGRQ (reconstructed), a minute",
    "repq": "RepQ-ViT, seconds",
    "mse": "least squared error",
    "minmax": "smallest to largest value",
}
WIDTHS = {"w8a8": "8", "w6a6": "6", "w4a4": "4", "w3a3": "3"}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A line a method over widths, and the float model above them."""
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "lowbit-vit", "font.size": 11}
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    axes.axhline(rows[0]["top1_float"], color="0.45", linestyle=":")
    axes.annotate("float, 32 bits", (0, rows[0]["top1_float"]), (2, 4), textcoords="offset points")
    for (name, label), marker in zip(NAMES.items(), "osD^", strict=True):
        found = {row["bits"]: row["top1"] for row in rows if row["method"] == name}
        axes.plot(
            list(WIDTHS.values()), [found[bits] for bits in WIDTHS], marker=marker, label=label
        )
    axes.set_xlabel("bits of weights and activations")
    axes.set_ylabel("top-1 of an ImageNet ViT-Ti")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(json.loads((Path(sys.argv[1]) / "metrics.json").read_text())["table"], PICTURE)

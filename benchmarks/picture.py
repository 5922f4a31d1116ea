"""Draws docs/pictures/ptq.svg from `docs/results/overview.json` and the ledger's mixed rows.

python benchmarks/picture.py

The first is the `metrics.json` of `train.py quantize --config ptq/overview`.
"""

import json
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from qat.cli import ledger
from qat.cli.charts.theme import BLUE, RED, SKY, layer, layered, pictured

OVERVIEW = ledger.ROOT / "docs" / "results" / "overview.json"
PICTURE = ledger.ROOT / "docs" / "pictures" / "ptq.svg"
METHODS = {
    "mixed_ten": ("PMQ, then MGRQ (reconstructed): ten minutes", BLUE),
    "mgrq": ("MGRQ: trains block by block, a minute", SKY),
    "repq": ("RepQ-ViT: rescales layers, seconds", RED),
    "mse": ("range of least error", "#6E7781"),
    "minmax": ("range from smallest to largest", "#AFB8C1"),
}
"""Label and colour of each method's line."""
BITS = {"w8a8": "8 bits", "w6a6": "6 bits", "w4a4": "4 bits", "w3a3": "3 bits"}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A line a method over bits, and the float model above them."""
    labels, colours = zip(*METHODS.values(), strict=True)
    points = [
        {"bits": BITS[row["bits"]], "method": METHODS[row["method"]][0], "top1": row["top1"]}
        for row in rows
    ]
    percent = alt.Axis(format=".0%", tickCount=5)
    y = alt.Y("top1:Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=percent)
    axis = alt.Axis(labelAngle=0)
    x = alt.X("bits:O", sort=list(BITS.values()), title="for weights and activations", axis=axis)
    legend = alt.Legend(
        orient="bottom-left", direction="vertical", symbolType="stroke", labelLimit=0
    )
    lines = layer(points).encode(
        x=x,
        y=y,
        color=alt.Color(
            "method:N",
            title="method",
            legend=legend,
            scale=alt.Scale(domain=labels, range=colours),
        ),
    )
    top1 = rows[0]["top1_float"]
    exact = layer([{"top1": top1, "text": f"32-bit float, {top1:.0%}"}]).encode(y=y)
    text = exact.mark_text(align="right", dy=-8).encode(text="text:N", x=alt.value("width"))
    rule = exact.mark_rule(strokeDash=[4, 3], opacity=0.7)
    title = "Photos that an ImageNet ViT-Ti still names right, of 650"
    drawn = layered(280, rule, text, lines.mark_line(point=True)).properties(title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(vl_convert.vegalite_to_svg(pictured([drawn])))


def mixed() -> list[dict[str, Any]]:
    """What the ledger has of the best known method, at the operations of each width."""
    found = {run["name"]: run["measures"]["top1"] for run in ledger.runs()}
    return [
        {"bits": bits, "method": "mixed_ten", "top1": found[name]}
        for bits in BITS
        if (name := f"val_{bits}_mixed_ten") in found
    ]


if __name__ == "__main__":
    draw([*json.loads(OVERVIEW.read_text())["table"], *mixed()], PICTURE)

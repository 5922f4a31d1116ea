"""Draws docs/pictures/ptq.svg, the picture of the README, from the rows of the ledger.

python benchmarks/picture.py
"""

import json
from pathlib import Path

import altair as alt
import vl_convert

from qat.cli import ledger
from qat.cli.charts.theme import BLUE, RED, SKY, layer, layered, pictured

PICTURE = ledger.ROOT / "docs" / "pictures" / "ptq.svg"
METHODS = {
    "mixed_ten": ("PMQ, then MGRQ (reconstructed): ten minutes", BLUE),
    "minute": ("MGRQ (reconstructed): a minute", SKY),
    "repq": ("RepQ-ViT: seconds", RED),
    "minmax": ("range from smallest to largest value", "#AFB8C1"),
}
"""Label and colour of each method's line; its rows are `val_<bits>_<method>`."""
BITS = {"w8a8": "8 bits", "w6a6": "6 bits", "w4a4": "4 bits", "w3a3": "3 bits"}
COMPARED = ledger.ROOT / "docs" / "results" / "val650_methods.json"
"""A run on the same photos, which has the float model's top-1."""


def draw(path: Path = PICTURE) -> None:
    """A line a method over bits, and the float model above them."""
    found = {run["name"]: run["measures"].get("top1") for run in ledger.runs()}
    points = [
        {"bits": label, "method": METHODS[method][0], "top1": found[name]}
        for method in METHODS
        for bits, label in BITS.items()
        if (name := f"val_{bits}_{method}") in found
    ]
    labels, colours = zip(*METHODS.values(), strict=True)
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
    top1 = json.loads(COMPARED.read_text())["table"][0]["top1_float"]
    exact = layer([{"top1": top1, "text": f"32-bit float, {top1:.0%}"}]).encode(y=y)
    text = exact.mark_text(align="right", dy=-8).encode(text="text:N", x=alt.value("width"))
    rule = exact.mark_rule(strokeDash=[4, 3], opacity=0.7)
    title = "Photos that an ImageNet ViT-Ti still names right, of 650"
    drawn = layered(280, rule, text, lines.mark_line(point=True)).properties(title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(vl_convert.vegalite_to_svg(pictured([drawn])))


if __name__ == "__main__":
    draw()

"""Draws docs/pictures/ptq.svg from a run of `train.py quantize --config ptq/overview`.

python benchmarks/picture.py RUN
"""

import json
import sys
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from qat.cli.charts.theme import BLUE, RED, layer, layered, pictured

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "ptq.svg"
METHODS = {
    "mgrq": ("MGRQ (reconstructed): trains block by block, minutes", BLUE),
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
    title = "Photos that an ImageNet ViT-Ti still names right, of 468"
    drawn = layered(280, rule, text, lines.mark_line(point=True)).properties(title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(vl_convert.vegalite_to_svg(pictured([drawn])))


if __name__ == "__main__":
    draw(json.loads((Path(sys.argv[1]) / "metrics.json").read_text())["table"], PICTURE)

"""How every chart looks, on a page and as a picture, and the names of layers on its axes.

Colours are those of Okabe and Ito (2008), which people tell apart whatever they see of red and
green. Text has the colour of the text around it, so that one chart serves light, dark and print.
"""

import re
from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from qat import disk

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#8C9199"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, GREY)
SHADES = (
    "#cfe4f1", "#b5d5ea", "#93c2e0", "#6aaad4", "#4a93c7",
    "#3079b6", "#1f5f9e", "#12427a", "#0a2a52",
)  # fmt: skip
"""Of 1 to 8 bits, and of more."""
INK = "currentColor"
PICTURE_INK, PAPER, PICTURE_WIDTH = "#24292F", "white", 720
SCALE = 1.5
"""Pixels of a picture for each unit of a chart."""

OUTSIDE = "-"
CELL = 22
"""Height of a cell of a grid."""
GAPS = alt.Scale(paddingInner=0.08, paddingOuter=0.04)

Row = Mapping[str, Any]
Number = int | float
Tip = alt.Tooltip | str
Drawing = alt.Chart | alt.LayerChart


def config(ink: str) -> dict[str, Any]:
    """The look of axes, legends and text, in one ink."""
    faint = {"gridColor": ink, "gridOpacity": 0.12, "domainColor": ink, "tickColor": ink}
    thin = {"domainOpacity": 0.35, "tickOpacity": 0.35, "tickSize": 4}
    text = {"labelColor": ink, "titleColor": ink, "labelFontSize": 11, "titleFontSize": 11}
    return {
        "font": "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif",
        "background": None,
        "view": {"stroke": None},
        "axis": {**faint, **thin, **text, "titleFontWeight": "normal", "labelLimit": 170},
        "axisX": {"grid": False},
        "axisY": {"titlePadding": 8},
        "legend": {**text, "orient": "bottom", "titleFontWeight": "normal", "symbolStrokeWidth": 2},
        "title": {"color": ink, "subtitleColor": ink, "anchor": "start", "fontSize": 13},
        "text": {"color": ink, "fontSize": 11},
        "rule": {"color": ink},
        "line": {"strokeWidth": 2},
        "range": {"category": list(PALETTE)},
    }


def shade(bits: Number) -> str:
    """The colour of a width, the same in every chart."""
    return SHADES[min(ceil(bits), len(SHADES)) - 1]


def layer(rows: Sequence[Row]) -> alt.Chart:
    """A chart of rows that is to be one of several layers."""
    return alt.Chart(alt.InlineData(values=[dict(row) for row in rows]))


def chart(rows: Sequence[Row], height: int) -> alt.Chart:
    """A chart of rows, as wide as there is room."""
    return layer(rows).properties(width="container", height=height)


def layered(height: int, *layers: alt.Chart | alt.LayerChart) -> alt.LayerChart:
    """Layers above each other, as wide as there is room; the last one is in front."""
    return alt.LayerChart(layer=list(layers)).properties(width="container", height=height)


def spec(drawing: Drawing) -> dict[str, Any]:
    """The specification of a chart of the page."""
    return {
        **drawing.to_dict(),
        "config": config(INK),
        "autosize": {"type": "fit-x", "contains": "padding"},
    }


def pictured(
    drawings: Sequence[Drawing], ink: str = PICTURE_INK, paper: str | None = PAPER
) -> dict[str, Any]:
    """The specification of a picture: charts one below the other; no paper is transparent."""
    wide = [drawing.properties(width=PICTURE_WIDTH) for drawing in drawings]
    whole = alt.vconcat(*wide).resolve_scale(x="independent", color="independent").to_dict()
    return {**whole, "config": {**config(ink), "background": paper, "padding": 12}}


def save_png(drawings: Sequence[Drawing], path: Path) -> None:
    """Write charts, one below the other, as a picture.

    Raises:
        OSError: If the disk fails.
    """
    disk.write(path, vl_convert.vegalite_to_png(pictured(drawings), scale=SCALE))


def placed(layer: str) -> tuple[str, str]:
    """The block of a layer, such as `blocks.3`, and what it is within it; empty for no block."""
    found = re.fullmatch(r"(.*\.\d+)\.(.+)", layer)
    return (found[1], found[2]) if found else ("", layer)


def block_label(block: str) -> str:
    """A block by its numbers alone: `3` of `blocks.3`, `0.1` of `layers.0.blocks.1`."""
    return ".".join(re.findall(r"\d+", block)) or OUTSIDE


def in_grid(rows: Sequence[Row], name: str = "layer") -> list[dict[str, Any]]:
    """The rows with `block` and `part`, by which a grid of blocks has a cell for each."""
    found = []
    for row in rows:
        block, part = placed(row[name])
        found.append({**row, "block": block_label(block), "part": part})
    return found


def log_axis(values: Sequence[Number]) -> dict[str, Any]:
    """Ticks of a logarithmic axis or legend: powers of ten, and 2 and 5 times these if few."""
    low, high = min(values), max(values)
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    steps = (1,) if len(powers) > 3 else (1, 2, 5)
    ticks = [step * 10.0**power for power in powers for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    form = "datum.value < 0.001 ? format(datum.value, '.0e') : format(datum.value, '~g')"
    return {"values": ticks, "labelExpr": form}


def grid(
    rows: Sequence[Row], colour: alt.Color, tooltip: Sequence[Tip], title: str | None = None
) -> alt.Chart:
    """A cell for each layer: blocks from left to right, what is in a block from top to bottom.

    Args:
        rows: Those of `in_grid`.
        colour: How a cell is coloured.
        tooltip: What is shown of the cell under the pointer.
        title: What the cells are.
    """
    parts = list(dict.fromkeys(row["part"] for row in rows))
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    title_x = "block" if OUTSIDE not in blocks else f"block; {OUTSIDE} is outside of them"
    drawing = (
        chart(rows, CELL * len(parts))
        .mark_rect(cornerRadius=2, stroke=INK, strokeOpacity=0.3, strokeWidth=0.5)
        .encode(
            x=alt.X("block:N", sort=blocks, title=title_x, scale=GAPS, axis=alt.Axis(labelAngle=0)),
            y=alt.Y("part:N", sort=parts, title=None, scale=GAPS),
            color=colour,
            tooltip=list(tooltip),
        )
    )
    return drawing if title is None else drawing.properties(title=title)


def written(cells: alt.Chart, field: str, light: str) -> alt.LayerChart:
    """Cells with a number in each, light on those for which an expression holds."""
    ink = alt.condition(light, alt.value("white"), alt.value("#111"))
    numbers = cells.mark_text(fontSize=11).encode(text=field, color=ink)
    return alt.LayerChart(layer=[cells, numbers])

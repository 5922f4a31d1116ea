"""Charts of what a model costs: precision by layer, size and speed beside float."""

from collections.abc import Sequence
from math import ceil

import altair as alt

from qat.cli.charts.theme import (
    BLUE,
    GREY,
    Drawing,
    Number,
    Row,
    chart,
    grid,
    in_grid,
    layer,
    layered,
    shade,
)

FLOAT_BITS = 32
TOTALS = {"MACs": "macs", "weight bytes": "weight_bytes"}
MODELS = ("float", "exported")


def coverage_chart(rows: Sequence[Row]) -> Drawing:
    """A cell for each product, coloured by the bits of its wider operand.

    Args:
        rows: The `products` of `metrics.json`.
    """
    tips = ["layer:N", "precision:N", alt.Tooltip("macs:Q", format=","), "reason:N"]
    cells = in_grid([{**row, "width": _width(row)} for row in rows])
    return grid(cells, _colour(rows), tips)


def share_chart(rows: Sequence[Row]) -> Drawing:
    """Shares of the widths in all multiply-accumulates, and in all bytes of weights."""
    bars = [
        {"what": what, "width": _width(row), "rank": row["bits"],
         "share": row[key] / max(1, sum(row[key] for row in rows))}
        for what, key in TOTALS.items()
        for row in rows
    ]  # fmt: skip
    axis = alt.Axis(format=".0%", tickCount=5)
    return chart(bars, 64).mark_bar().encode(
        x=alt.X("sum(share):Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=axis),
        y=alt.Y("what:N", title=None, sort=list(TOTALS)),
        color=_colour(rows),
        order="rank:Q",
        tooltip=["what:N", "width:N", alt.Tooltip("sum(share):Q", format=".2%")],
    )  # fmt: skip


def beside_float_chart(
    values: tuple[Number, Number], texts: tuple[str, str], title: str
) -> Drawing:
    """Two bars: the float model and the exported file, with their numbers."""
    bars = [
        {"model": name, "value": value, "text": text}
        for name, value, text in zip(MODELS, values, texts, strict=True)
    ]
    room = alt.Scale(domain=[0, 1.25 * max(values)], nice=False)
    base = layer(bars).encode(
        x=alt.X("value:Q", scale=room, axis=None),
        y=alt.Y("model:N", title=None, sort=list(MODELS)),
    )
    scale = alt.Scale(domain=list(MODELS), range=[GREY, BLUE])
    drawn = base.mark_bar(cornerRadiusEnd=2).encode(
        color=alt.Color("model:N", legend=None, scale=scale)
    )
    numbers = base.mark_text(align="left", dx=6).encode(text="text:N")
    return layered(64, drawn, numbers).properties(title=title)


def groups_chart(rows: Sequence[Row], lines: dict[str, str], title: str) -> Drawing:
    """Bars of some columns for each group of time steps of a diffusion model."""
    bars = [
        {"times": f"{row['first']}-{row['last']}", "who": label, "value": row[key]}
        for row in rows
        for key, label in lines.items()
        if key in row
    ]
    order = list(dict.fromkeys(bar["times"] for bar in bars))
    who = alt.Scale(domain=list(lines.values()), range=[GREY, BLUE][-len(lines) :])
    return chart(bars, 200).mark_bar(cornerRadiusEnd=2).encode(
        x=alt.X("times:N", sort=order, title="time steps, from clean to noise",
                axis=alt.Axis(labelAngle=0)),
        xOffset=alt.XOffset("who:N", sort=list(lines.values())),
        y=alt.Y("value:Q", title=title),
        color=alt.Color("who:N", title=None, scale=who),
        tooltip=["times:N", "who:N", alt.Tooltip("value:Q", format=".4g")],
    )  # fmt: skip


def _width(row: Row) -> str:
    """The bits of the wider operand, whole ones."""
    bits = ceil(row["bits"])
    return "float" if _is_float(row) else f"{bits} bit{'s' * (bits > 1)}"


def _is_float(row: Row) -> bool:
    return row["bits"] >= FLOAT_BITS


def _colour(rows: Sequence[Row]) -> alt.Color:
    """The more bits the darker; float in grey."""
    ordered = sorted(rows, key=lambda row: row["bits"])
    shades = {_width(row): GREY if _is_float(row) else shade(row["bits"]) for row in ordered}
    scale = alt.Scale(domain=list(shades), range=list(shades.values()))
    return alt.Color(
        "width:N", title=None, scale=scale, legend=alt.Legend(columns=3, symbolStrokeWidth=0)
    )

"""Charts of what a model costs: precision by layer, size and speed beside float."""

from collections.abc import Sequence

import altair as alt

from qat.cli.charts.theme import (
    BLUE,
    GREY,
    PALETTE,
    Drawing,
    Row,
    chart,
    grid,
    in_grid,
    layer,
    layered,
)

PACKED = ("float", "packed")


def coverage_chart(rows: Sequence[Row]) -> Drawing:
    """A cell for each product, coloured by its precision.

    Args:
        rows: The `products` of `metrics.json`.
    """
    tips = ["layer:N", "precision:N", alt.Tooltip("macs:Q", format=","), "reason:N"]
    return grid(in_grid(rows), _precision(rows), tips)


def share_chart(rows: Sequence[Row]) -> Drawing:
    """Shares of the precisions in all multiply-accumulates, and in all bytes of weights."""
    totals = {"multiply-accumulates": "macs", "bytes of weights": "weight_bytes"}
    bars = [
        {"what": what, "precision": precision, "share": sum(
            row[key] for row in rows if row["precision"] == precision
        ) / max(1, sum(row[key] for row in rows))}
        for what, key in totals.items()
        for precision in _precisions(rows)
    ]  # fmt: skip
    return chart(bars, 70).mark_bar().encode(
        x=alt.X("share:Q", title=None, scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(format=".0%", tickCount=5)),
        y=alt.Y("what:N", title=None, sort=list(totals)),
        color=_precision(rows),
        tooltip=["what:N", "precision:N", alt.Tooltip("share:Q", format=".2%")],
    )  # fmt: skip


def beside_float_chart(values: tuple[float, float], texts: tuple[str, str], title: str) -> Drawing:
    """Two bars: the float model and the packed file, with their numbers."""
    bars = [
        {"model": name, "value": value, "text": text}
        for name, value, text in zip(PACKED, values, texts, strict=True)
    ]
    room = alt.Scale(domain=[0, 1.25 * max(values)], nice=False)
    base = layer(bars).encode(
        x=alt.X("value:Q", scale=room, axis=None),
        y=alt.Y("model:N", title=None, sort=list(PACKED)),
    )
    scale = alt.Scale(domain=list(PACKED), range=[GREY, BLUE])
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


def _precisions(rows: Sequence[Row]) -> list[str]:
    return sorted({row["precision"] for row in rows}, key=lambda name: (name == "float", name))


def _precision(rows: Sequence[Row]) -> alt.Color:
    """Quantized precisions in colours, float in grey."""
    names = _precisions(rows)
    colours = [GREY if name == "float" else PALETTE[i % 6] for i, name in enumerate(names)]
    return alt.Color("precision:N", title=None, scale=alt.Scale(domain=names, range=colours))

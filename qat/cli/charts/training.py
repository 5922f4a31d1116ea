"""Charts of a training run: its curves, its weights, its oscillating layers, its signs."""

from collections.abc import Mapping, Sequence

import altair as alt

from qat.cli.charts.theme import BLUE, GREY, Drawing, Row, chart, grid, in_grid

MOST_COLUMNS = 60
"""Epochs that a map over time shows, evenly chosen."""

PALE = 0.1
"""A share that still looks like little."""
WEIGHT = "weight / mean |weight|"


def curve_chart(rows: Sequence[Row], lines: Mapping[str, str], title: str) -> Drawing:
    """Some columns of `metrics.csv` over the steps of training.

    Args:
        rows: Those of the table; a column is empty where it was not logged.
        lines: Columns, and what they are called.
        title: What the axis says.
    """
    points = [
        {"step": row["step"], "value": row[key], "line": label}
        for key, label in lines.items()
        for row in rows
        if row.get(key) is not None
    ]
    several = len({point["line"] for point in points}) > 1
    legend = alt.Legend(title=None, symbolType="stroke") if several else None
    return chart(points, 200).mark_line(point={"size": 14} if len(points) < 60 else False).encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(tickCount=6)),
        y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5)),
        color=alt.Color("line:N", sort=list(lines.values()), legend=legend),
        tooltip=["step:Q", "line:N", alt.Tooltip("value:Q", format=".4g")],
    )  # fmt: skip


def weights_over_time_chart(rows: Sequence[Row]) -> Drawing:
    """A column an epoch: where the weights are, in units of their mean magnitude.

    Args:
        rows: Those of `weights.csv`.
    """
    kept = rows[:: max(1, -(-len(rows) // MOST_COLUMNS))]
    cells = [point for row in kept for point in _bins(row)]
    epochs = [row["epoch"] for row in kept]
    few = [epoch for i, epoch in enumerate(epochs) if i % max(1, len(epochs) // 6) == 0]
    return chart(cells, 240).mark_rect().encode(
        x=alt.X("epoch:O", title="epoch", axis=alt.Axis(labelAngle=0, values=few)),
        y=alt.Y("low:Q", title=WEIGHT, scale=alt.Scale(nice=False)),
        y2="high:Q",
        color=alt.Color(
            "share:Q", title="share of weights", scale=alt.Scale(scheme="viridis"),
            legend=alt.Legend(format=".1~%", tickCount=3),
        ),
        tooltip=["epoch:O", "weight:Q", alt.Tooltip("share:Q", format=".2%")],
    )  # fmt: skip


def weights_chart(rows: Sequence[Row]) -> Drawing:
    """The same distribution at the start and at the end of training."""
    ends = {"start": rows[0], f"epoch {rows[-1]['epoch']:g}": rows[-1]}
    points = [{**point, "when": when} for when, row in ends.items() for point in _bins(row)]
    scale = alt.Scale(domain=list(ends), range=[GREY, BLUE])
    return chart(points, 240).mark_area(
        line={"strokeWidth": 2}, fillOpacity=0.18, interpolate="monotone"
    ).encode(
        x=alt.X("weight:Q", title=WEIGHT),
        y=alt.Y("share:Q", title="share of weights", stack=None,
                axis=alt.Axis(format=".1~%", tickCount=5)),
        color=alt.Color("when:N", title=None, scale=scale),
        tooltip=["when:N", "weight:Q", alt.Tooltip("share:Q", format=".2%")],
    )  # fmt: skip


def share_grid(rows: Sequence[Row], key: str, title: str) -> Drawing:
    """A cell for each layer, coloured by a share of its weights that should be small.

    Args:
        rows: A row a layer.
        key: The share.
        title: What it is.
    """
    most = max(PALE, *(row[key] for row in rows))
    colour = alt.Color(f"{key}:Q", title=None, scale=alt.Scale(scheme="oranges", domain=[0, most]),
                       legend=alt.Legend(format="~%", tickCount=3))  # fmt: skip
    tips = [alt.Tooltip("layer:N"), alt.Tooltip(f"{key}:Q", format=".3%")]
    return grid(in_grid(rows), colour, tips, title)


def balance_grid(rows: Sequence[Row], key: str, title: str) -> Drawing:
    """A cell for each binary operand, coloured by how unequal its signs are, from 0 to 1."""
    short = [{**row, "layer": row["layer"].replace("_quantizer", "")} for row in rows]
    colour = alt.Color(f"{key}:Q", title=None, scale=alt.Scale(scheme="purples", domain=[0, 1]),
                       legend=alt.Legend(tickCount=3))  # fmt: skip
    tips = [alt.Tooltip("layer:N"), alt.Tooltip(f"{key}:Q", format=".3f")]
    return grid(in_grid(short), colour, tips, title)


def _bins(row: Row) -> list[dict[str, float]]:
    """The bins of an epoch: centre, edges and share of each."""
    bins = [(float(key), share) for key, share in row.items() if key != "epoch"]
    half = (bins[1][0] - bins[0][0]) / 2
    return [
        {"epoch": row["epoch"], "weight": at, "low": at - half, "high": at + half, "share": share}
        for at, share in bins
    ]

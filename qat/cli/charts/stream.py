"""Charts of an adaptation: the error along the stream, and under each corruption."""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import altair as alt

from qat.cli.charts.theme import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SKY,
    Drawing,
    Row,
    chart,
    layer,
    layered,
    save_png,
)
from qat.cli.tables import read_table

SMOOTHING = 0.2
"""Share of a batch in the running mean that is drawn."""
MOST_DOMAINS = 25
"""More than these are not named along the stream."""
ADAPTED, SOURCE = "adapted", "without adaptation"
WHO = {"error_source": SOURCE, "error": ADAPTED, "agreement": "same answer as without adaptation"}
LEFT = alt.Axis(minExtent=52)
"""Room beside the plot, the same for both charts, so that their batches stand in line."""
REFUSED = ("batch:Q", "refused:Q", "reason:N")
OUTCOMES = {"adapted": BLUE, "kept": GREY, "skipped": SKY, "rolled back": ORANGE, "reset": RED}


def save_stream(table: Path, never_adapted: str | None, picture: Path) -> None:
    """Draw the error along a stream, and what became of each batch.

    Args:
        table: The `stream.csv` of a run.
        never_adapted: Why nothing was adapted, if so.
        picture: The PNG file that is written.
    """
    rows = read_table(table)
    said = effect(rows, never_adapted)
    save_png([stream_chart(rows, said), outcome_chart(rows)], picture)


def effect(rows: Sequence[Row], never_adapted: str | None) -> str:
    """How many batches adaptation made better or worse; why none adapted, where that is so.

    Args:
        rows: Those of `stream.csv`.
        never_adapted: Why no batch adapted, where that is so.
    """
    if never_adapted:
        return f"No batch adapted: {never_adapted}."
    if "error" not in rows[0]:
        changed = sum(row["agreement"] < 1 for row in rows)
        return f"Adaptation changed answers in {changed} of {len(rows)} batches."
    gains = [row["error_source"] - row["error"] for row in rows]
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    if not better + worse:
        return "Both lines are one: adaptation made no batch better or worse."
    return f"Of {len(rows)} batches, adaptation made {better} better and {worse} worse."


def stream_chart(rows: Sequence[Row], title: str = "") -> Drawing:
    """Running mean of the error, with and without adaptation; of equal answers without labels.

    Args:
        rows: Those of `stream.csv`.
        title: What stands above it.
    """
    lines = [key for key in WHO if key in rows[0]]
    points = [
        {"batch": row["position"], "value": value, "who": WHO[key], "domain": row["domain"]}
        for key in lines
        for row, value in zip(rows, _smooth([row[key] for row in rows]), strict=True)
    ]
    names = [WHO[key] for key in lines]
    style = {SOURCE: (GREY, 4.5), ADAPTED: (BLUE, 2), WHO["agreement"]: (GREEN, 2)}
    colours, widths = zip(*(style[name] for name in names), strict=True)
    width = alt.Scale(domain=names, range=widths)
    axis = "error, running mean" if "error" in lines else "equal answers, running mean"
    line = layer(points).mark_line().encode(
        x=_batches("batch", rows),
        y=alt.Y("value:Q", title=axis, axis=LEFT, scale=alt.Scale(domain=[0, 1])),
        color=alt.Color("who:N", title=None, sort=names).scale(domain=names, range=colours),
        strokeWidth=alt.StrokeWidth("who:N", title=None, sort=names, scale=width),
        tooltip=["batch:Q", "domain:N", "who:N", alt.Tooltip("value:Q", format=".3f")],
    )  # fmt: skip
    drawn = layered(260, line, *_domains(rows)).resolve_axis(x="independent")
    return drawn.properties(title=title) if title else drawn


def _domains(rows: Sequence[Row]) -> Iterator[alt.Chart]:
    """Where one domain ends and the next begins, their names on an axis above; none if many."""
    starts = {
        next(group)["position"]: domain.replace("_", " ")
        for domain, group in groupby(rows, lambda row: row["domain"])
    }
    if 1 < len(starts) <= MOST_DOMAINS:
        names = json.dumps({str(int(start)): name for start, name in starts.items()})
        axis = alt.Axis(
            orient="top", values=list(starts), labelExpr=f"{names}[datum.value]", title=None,
            labelAngle=-90, labelAlign="left", labelBaseline="middle", labelPadding=6,
            labelOverlap=False, domain=False,
        )  # fmt: skip
        x = _batches("batch", rows, axis)
        yield layer([{"batch": start} for start in starts]).mark_rule(opacity=0.2).encode(x=x)


def _batches(field: str, rows: Sequence[Row], axis: alt.Axis | None = None) -> alt.X:
    scale = alt.Scale(domain=[0, len(rows)], nice=False)
    return alt.X(f"{field}:Q", title="batch", scale=scale, axis=axis or alt.Axis(tickCount=8))


def outcome_chart(rows: Sequence[Row]) -> Drawing:
    """What became of each batch, and where images were refused."""
    found = [name for name in OUTCOMES if any(row["outcome"] == name for row in rows)]
    cells = [
        {"first": group[0]["position"], "end": group[-1]["position"] + 1, "outcome": outcome,
         "reason": group[0]["reason"]}
        for outcome, group in (
            (name, list(group)) for name, group in groupby(rows, lambda row: row["outcome"])
        )
    ]  # fmt: skip
    scale = alt.Scale(domain=found, range=[OUTCOMES[name] for name in found])
    strip = layer(cells).mark_rect().encode(
        x=_batches("first", rows),
        x2="end:Q",
        y=alt.YDatum("outcome", title=None, axis=LEFT),
        color=alt.Color("outcome:N", title=None, scale=scale),
        tooltip=["outcome:N", "first:Q", "end:Q", "reason:N"],
    )  # fmt: skip
    refused = [
        {"batch": row["position"] + 0.5, "refused": row["n_refused"], "reason": row["reason"]}
        for row in rows
        if row["n_refused"]
    ]
    crosses = layer(refused).mark_text(text="✕", fontSize=13, fontWeight="bold")
    marks = crosses.encode(x=_batches("batch", rows), y=alt.YDatum("outcome"), tooltip=REFUSED)
    return layered(26, strip, marks)


def corruption_chart(rows: Sequence[Row]) -> Drawing:
    """Error under each corruption, with and without adaptation.

    Args:
        rows: The `table` of `metrics.json`.
    """
    bars = [
        {"corruption": row["corruption"], "who": WHO[key], "error": row[key]}
        for row in rows
        for key in ("error_source", "error")
    ]
    names = [row["corruption"] for row in rows]
    who = alt.Scale(domain=[SOURCE, ADAPTED], range=[GREY, BLUE])
    return chart(bars, 26 * len(rows)).mark_bar(cornerRadiusEnd=2).encode(
        x=alt.X("error:Q", title="error", axis=alt.Axis(grid=True, tickCount=6)),
        y=alt.Y("corruption:N", sort=names, title=None, scale=alt.Scale(paddingInner=0.3)),
        yOffset=alt.YOffset("who:N", sort=[SOURCE, ADAPTED]),
        color=alt.Color("who:N", title=None, scale=who),
        tooltip=["corruption:N", "who:N", alt.Tooltip("error:Q", format=".3f")],
    )  # fmt: skip


def _smooth(values: Sequence[float]) -> list[float]:
    smooth: list[float] = []
    for value in values:
        last = smooth[-1] if smooth else value
        smooth.append(last + SMOOTHING * (value - last))
    return smooth

"""Charts of a search: what each operand loses, the bits it got, and the frontier."""

from collections.abc import Sequence

import altair as alt

from qat.cli.charts.theme import (
    BLUE,
    GREY,
    RED,
    SHADES,
    Drawing,
    Number,
    Row,
    grid,
    in_grid,
    layer,
    layered,
    log_axis,
    written,
)

NEAR = 4
"""Width whose sensitivity is shown, or the one nearest to it."""
LEAST = 1e-12
"""What a loss of zero is drawn as, where the axis is logarithmic."""
POINTS = 400
"""Points of a frontier that are drawn, evenly along it."""
UNITS = {"bops": "BOPs of an image", "size_bytes": "bytes", "seconds": "seconds an image"}
FORMS = {"bops": "~s", "size_bytes": "~s", "seconds": "~g"}

TIPS = (
    alt.Tooltip("name:N"),
    alt.Tooltip("bits:Q"),
    alt.Tooltip("sensitivity:Q", format=".3g"),
)


def sensitivity_chart(rows: Sequence[Row]) -> Drawing:
    """A cell for each operand: its sensitivity at a common width, on a logarithmic scale.

    Args:
        rows: Those of `sensitivity.csv`.
    """
    cells = [
        min(widths, key=lambda row: abs(row["bits"] - NEAR)) for widths in _slots(rows).values()
    ]
    floor = min((row["sensitivity"] for row in cells if row["sensitivity"] > 0), default=LEAST)
    shown = [{**row, "loss": max(row["sensitivity"], floor)} for row in cells]
    scale = alt.Scale(type="log", scheme="viridis", reverse=True)
    legend = alt.Legend(**log_axis([row["loss"] for row in shown]))
    colour = alt.Color("loss:Q", scale=scale, title=None, legend=legend)
    return grid(_named(shown), colour, TIPS, f"Sensitivity at {NEAR} bits")


def bits_chart(rows: Sequence[Row]) -> Drawing:
    """A cell for each operand: the bits that it got."""
    shown = _named([row for row in rows if row["chosen"]])
    scale = alt.Scale(domain=list(range(1, 1 + len(SHADES))), range=SHADES)
    colour = alt.Color("bits:Q", scale=scale, title="bits", legend=None)
    return written(grid(shown, colour, TIPS, "Bits chosen"), "bits:Q", "datum.bits > 4")


def frontier_chart(
    rows: Sequence[Row], chosen: tuple[Number, Number], budget: Number | None, measure: str
) -> Drawing:
    """Least loss at every cost, with the chosen point and the budget.

    Args:
        rows: Those of `frontier.csv`.
        chosen: Cost and loss of the plan.
        budget: Most that it may cost, if there is a limit.
        measure: Unit of the cost, a column of the rows.
    """
    kept = rows[:: max(1, len(rows) // POINTS)]
    points = [{"cost": row[measure], "loss": max(row["loss"], LEAST)} for row in kept]
    x = alt.X(
        "cost:Q", title=UNITS[measure], axis=alt.Axis(format=FORMS[measure], tickCount=6),
        scale=alt.Scale(zero=False),
    )  # fmt: skip
    ticks = alt.Axis(**log_axis([point["loss"] for point in points]))
    y = alt.Y("loss:Q", title="loss", scale=alt.Scale(type="log", nice=False), axis=ticks)
    line = layer(points).mark_line(color=BLUE).encode(x=x, y=y)
    star = [{"cost": chosen[0], "loss": max(chosen[1], LEAST), "text": "chosen plan"}]
    base = layer(star).encode(x=x, y=y)
    layers = [line, base.mark_point(size=110, filled=True, color=RED, opacity=1)]
    layers.append(base.mark_text(align="left", dx=10, dy=-8, color=RED).encode(text="text:N"))
    if budget is not None:
        limit = layer([{"cost": budget, "text": "budget"}]).encode(x=x)
        layers.insert(0, limit.mark_rule(strokeDash=[4, 4], color=GREY))
        layers.append(
            limit.mark_text(align="left", dx=5, baseline="top", color=GREY).encode(
                text="text:N", y=alt.value(2)
            )
        )
    return layered(280, *layers)


def _slots(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(_name(row), []).append(row)
    return found


def _named(rows: Sequence[Row]) -> list[dict]:
    return in_grid([{**row, "name": _name(row)} for row in rows], "name")


def _name(row: Row) -> str:
    return f"{row['module']} {row['operand']}"

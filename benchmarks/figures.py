"""Draws the figures of docs/methods/ from the code of the methods.

python benchmarks/figures.py
"""

from pathlib import Path

import altair as alt
import torch
import vl_convert

from binaryvit.grs import BoundaryPull, DistancePull, SignPull
from qat import Operand, QuantSpec
from qat.cli.charts.theme import GREY, Drawing, chart, layer, layered, pictured
from qat.quantizers import Log2, LogSqrt2, TanQ

FOLDER = Path(__file__).parents[1] / "docs" / "methods"
PULLS = {
    "G1 DistancePull": DistancePull(),
    "G2 SignPull": SignPull(),
    "G3 BoundaryPull": BoundaryPull(),
}


def levels() -> Drawing:
    """The levels of 4-bit grids for attention maps, a row each."""
    spec = QuantSpec(4, signed=False)
    grids = {"uniform": torch.linspace(0, 1, 16)}
    for grid in (Log2, LogSqrt2, TanQ):
        grids[grid.__name__] = grid(spec, (197, 197), Operand.ATTENTION).levels()
    ticks = [{"grid": name, "value": x} for name, row in grids.items() for x in row.tolist()]
    return chart(ticks, 150).mark_tick(thickness=2).encode(
        x=alt.X("value:Q", title="value, in units of the scale"),
        y=alt.Y("grid:N", title=None, sort=list(grids)),
        color=alt.Color("grid:N", sort=list(grids), legend=None),
    )  # fmt: skip


def pulls() -> Drawing:
    """How far and in which direction descent along each form moves a latent weight."""
    w = torch.linspace(-2, 2, 801)[:, None]
    points = [
        {"weight": at, "pull": value, "form": name}
        for name, pull in PULLS.items()
        for at, value in zip(
            w[:, 0].tolist(), (-pull.direction(w, torch.ones(1)))[:, 0].tolist(), strict=True
        )
    ]
    title = "latent weight, in units of its row's mean magnitude k"
    lines = layer(points).mark_line().encode(
        x=alt.X("weight:Q", title=title),
        y=alt.Y("pull:Q", title="pull: moves to the right where positive"),
        color=alt.Color("form:N", title=None, sort=list(PULLS)),
    )  # fmt: skip
    modes = layer([{"weight": at} for at in (-1, 0, 1)])
    rules = modes.mark_rule(strokeDash=[2, 3], opacity=0.5).encode(x="weight:Q")
    return layered(220, rules, lines)


def main() -> None:
    """Write every figure, in a grey that is read on a light and on a dark page."""
    for name, draw in {"levels": levels, "grs": pulls}.items():
        whole = pictured([draw()], ink=GREY, paper=None)
        (FOLDER / f"{name}.svg").write_text(vl_convert.vegalite_to_svg(whole))


if __name__ == "__main__":
    main()

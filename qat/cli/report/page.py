"""The page: a template, filled with runs; text of runs is escaped, whatever it holds."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import qat
from qat.cli.report.cards import cards
from qat.cli.report.parts import Chart, Note, Picture, Table
from qat.cli.report.run import Run
from qat.cli.report.sections import sections
from qat.cli.report.side_by_side import side_by_side

ABOUT = {"seed": "seed ", "torch_version": "torch "}
"""What stands before some facts of a run, so that they can be told apart."""


def page(runs: Sequence[Run]) -> str:
    """The HTML of a page about runs."""
    return _template().render(
        title=", ".join(run.name for run in runs),
        version=qat.__version__,
        runs=[_shown(run) for run in runs],
        together=side_by_side(runs) if len(runs) > 1 else None,
        script=_script(),
    )


def _shown(run: Run) -> dict[str, Any]:
    """What the template says of a run; its sections come first, since they find its faults."""
    found = list(sections(run))
    about = {key: run.get(key) for key in ("command", "recipe", "seed", "device", "torch_version")}
    return {
        "run": run,
        "sections": found,
        "cards": cards(run),
        "about": " · ".join(
            f"{ABOUT.get(key, '')}{value}" for key, value in about.items() if value is not None
        ),
        "notes": list(_notes(run)),
    }


def _notes(run: Run) -> Iterator[str]:
    """What a reader must know before the numbers."""
    if not run.finished:
        yield (
            "This run has not ended, or was stopped: there is no metrics.json yet, and so no "
            "results. What it has written so far is below."
        )
    if random := run.get("untrained"):
        yield f"Untrained: {random}. The numbers are about random weights."
    if broken := run.get("not_finite"):
        yield f"Not finite, so the result means little: {', '.join(map(str, broken))}."
    yield from run.faults


@cache
def _template() -> Any:
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined)
    environment.tests |= {
        name: lambda part, kind=kind: isinstance(part, kind)
        for name, kind in {"chart": Chart, "table": Table, "picture": Picture, "note": Note}.items()
    }
    return environment.get_template("page.html")


@cache
def _script() -> str:
    """Vega, Vega-Lite and vega-embed, which draw the charts."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script")

"""What a diffusion model generates, and where its predictions err."""

from qat.cli.charts.costs import groups_chart
from qat.cli.charts.theme import spec
from qat.cli.report.parts import Chart, Part, Picture, Section
from qat.cli.report.run import Run

PICTURES = {"samples_float.png": "the float model", "samples.png": "this model"}
LINES = {"noise_error_float": "float", "noise_error": "this model"}


def samples(run: Run) -> Section | None:
    """Generated images, and noise errors by time step."""
    found = {name: run.picture(name) for name in PICTURES}
    parts: list[Part] = [Picture(uri, PICTURES[name]) for name, uri in found.items() if uri]
    if rows := run.rows("noise_error_by_time"):
        lines = {key: name for key, name in LINES.items() if key in rows[0]}
        drawn = groups_chart(rows, lines, "noise error")
        parts.append(Chart(spec(drawn), "noise error by time step", wide=True))
    words = (
        "Images from the same noise, a column for each class. Good is images that look alike in "
        "both grids, and errors of predicted noise as low as those of the float model."
    )
    return Section("Samples", words, parts) if parts else None

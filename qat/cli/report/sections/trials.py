"""The runs of a grid beside each other."""

from qat.cli.report.parts import Section, Table
from qat.cli.report.run import Run
from qat.cli.report.wording import plain

MEASURES = (
    "top1", "top1_float", "agreement", "logit_error", "noise_error", "class_accuracy", "frechet",
    "error_source_mean", "error_mean", "error_worst", "n_reset", "size_bytes", "bops",
    "seconds_calibration",
)  # fmt: skip


def trials(run: Run) -> Section | None:
    """A row for each choice of the grid."""
    rows = run.rows("table")
    if run.get("draws") is None or not rows:
        return None
    axes = [key for key in (run.recipe.get("grid") or {}) if key in rows[0]]
    columns = [*axes, "seed", *(key for key in MEASURES if any(key in row for row in rows))]
    table = [[plain(row.get(key)) for key in columns] for row in rows]
    words = (
        "Each row is one run of the grid. Compare rows of the same seed, which see the same images."
    )
    names = [key.replace("_", " ").capitalize() for key in columns]
    return Section("Runs of the grid", words, [Table(names, table)])

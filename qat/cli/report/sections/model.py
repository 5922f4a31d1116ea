"""What of a model is quantized, and what is not."""

from qat.cli.charts.costs import coverage_chart, share_chart
from qat.cli.charts.theme import spec
from qat.cli.report.parts import Chart, Part, Section, Table
from qat.cli.report.run import Run
from qat.cli.report.wording import percent


def coverage(run: Run) -> Section | None:
    """Precision of every layer, and why the others stay in float."""
    rows = run.rows("products")
    if not rows:
        return None
    parts: list[Part] = [
        Chart(spec(share_chart(rows)), "shares of the precisions"),
        Chart(spec(coverage_chart(rows)), "precision of every layer by block", wide=True),
    ]
    total = sum(row["macs"] for row in rows) or 1
    kept = [[r["layer"], r["reason"], percent(r["macs"] / total)] for r in rows if r["reason"]]
    if kept and any(row["low_bit"] for row in rows):
        parts.append(Table(("not below 16 bits", "why", "of the MACs"), kept))
    words = (
        "Each cell is a matrix product of the model; w4a4 means weights and activations of 4 bits. "
        "Good is little in grey, since what stays in float is neither small nor fast."
    )
    return Section("Precision by layer", words, parts)

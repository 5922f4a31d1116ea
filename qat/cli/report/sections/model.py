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
        Chart(spec(share_chart(rows)), "shares of the widths", wide=True),
        Chart(spec(coverage_chart(rows)), "precision of every layer by block", wide=True),
    ]
    total = sum(row["macs"] for row in rows) or 1
    kept = [[r["layer"], r["reason"], percent(r["macs"] / total)] for r in rows if r["reason"]]
    if 0 < len(kept) < len(rows):
        parts.append(Table(("Not below 16 bits", "Why", "Of the MACs"), kept, num_words=2))
    words = (
        "Each cell is a matrix product of the model, coloured by the bits of its wider operand. "
        "Good is little in grey, since what stays in float is neither small nor fast."
    )
    return Section("Precision by layer", words, parts)

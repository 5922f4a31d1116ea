"""What a search found: sensitivities, the chosen bits, the frontier."""

from qat.cli.charts.search import bits_chart, frontier_chart, sensitivity_chart
from qat.cli.charts.theme import spec
from qat.cli.report.parts import Chart, Section
from qat.cli.report.run import Run


def sensitivities(run: Run) -> Section | None:
    """What each operand loses, and the bits it got."""
    rows = run.table("sensitivity.csv")
    if not rows:
        return None
    words = (
        "The first map shows how much the model loses when one operand alone has few bits, the "
        "second one the bits that the plan gives it. Good is many bits where the first is dark."
    )
    parts = [
        Chart(spec(sensitivity_chart(rows)), "sensitivity of every operand by block"),
        Chart(spec(bits_chart(rows)), "bits chosen for every operand by block"),
    ]
    return Section("Sensitivities and chosen bits", words, parts)


def frontier(run: Run) -> Section | None:
    """The best trades of cost against loss, and the one that was taken."""
    rows, point = run.table("frontier.csv"), run.numbers("cost", "loss")
    measure = run.get("measure")
    if not rows or point is None or measure not in rows[0]:
        return None
    words = (
        "Each point of the line is the smallest loss that any plan of that cost has. Good is a "
        "chosen plan on the line, not beyond the budget, where the line has begun to flatten."
    )
    budget = run.numbers("budget")
    drawn = frontier_chart(rows, (point[0], point[1]), budget[0] if budget else None, measure)
    return Section("Frontier of plans", words, [Chart(spec(drawn), "loss against cost", wide=True)])

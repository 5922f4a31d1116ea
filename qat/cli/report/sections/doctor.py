"""What the doctor of a training run found."""

from qat.cli.report.parts import Section, Table
from qat.cli.report.run import Run
from qat.cli.report.wording import plain

COLUMNS = ("layer", "cause", "evidence", "suggestion")


def doctor(run: Run) -> Section | None:
    """Its findings, a row each."""
    rows = run.rows("doctor")
    if not rows:
        return None
    table = [[plain(row.get(key)) for key in COLUMNS] for row in rows]
    words = "What the training's own checks found: likely causes of trouble, and what to try."
    names = [key.capitalize() for key in COLUMNS]
    return Section("Findings of the doctor", words, [Table(names, table, num_words=None)])

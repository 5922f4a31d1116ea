"""The sections of a run on the page, in their order; what a run has none of is absent."""

from collections.abc import Callable, Iterator

from qat.cli.report.parts import Section
from qat.cli.report.run import Run
from qat.cli.report.sections.adaptation import adaptation, corruptions
from qat.cli.report.sections.doctor import doctor
from qat.cli.report.sections.export import export
from qat.cli.report.sections.model import coverage
from qat.cli.report.sections.samples import samples
from qat.cli.report.sections.search import frontier, sensitivities
from qat.cli.report.sections.training import curves, oscillation, signs, weights
from qat.cli.report.sections.trials import trials

SECTIONS: tuple[Callable[[Run], Section | None], ...] = (
    doctor, trials, curves, weights, oscillation, signs, sensitivities, frontier, corruptions,
    adaptation, samples, export, coverage,
)  # fmt: skip


def sections(run: Run) -> Iterator[Section]:
    """What the run has something of."""
    return (found for make in SECTIONS if (found := make(run)) is not None)

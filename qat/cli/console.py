"""What a command prints."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from qat.card import untrained
from qat.cli.run_folder import is_first_process
from qat.cost.count import cost
from qat.cost.coverage import coverage_lines, coverage_table
from qat.export.classifier import OnnxClassifier

WIDTH_OF_FILES = 160
"""Columns where the output goes to a file, so that no table loses digits there."""

console = Console(
    quiet=not is_first_process(), width=None if sys.stdout.isatty() else WIDTH_OF_FILES
)


def show(items: dict[str, Any], rows: Mapping[str, tuple[str, str]], title: str = "Result") -> None:
    """Print those of a run's results that a table has rows for."""
    table = Table("", "value", title=title, title_justify="left")
    for label, (key, form) in rows.items():
        if key in items:
            table.add_row(label, form.format(items[key]))
    console.print(table)


def say_untrained(model: nn.Module) -> None:
    """Say aloud what of a model has random weights, in a command that does not train them."""
    if random := untrained(model):
        console.print(
            f"untrained: {random}; what follows is about random weights. Name a trained model "
            "with --ckpt_path, or its file in the model's `weights`",
            highlight=False,
        )


def check_coverage(model: nn.Module, required: float | None) -> None:
    """Print the coverage of a model, and refuse one that is too low.

    Raises:
        ValueError: If less than `required` of the MACs runs below 16 bits, or it cannot be said.
    """
    if isinstance(model, OnnxClassifier):  # the export has printed it
        return _require_coverage(model.costs["coverage_macs"], required)
    costs = cost(model)
    console.print(coverage_table(costs))
    for line in coverage_lines(model, costs):
        console.print(line, highlight=False)
    if required is not None and costs.uncounted:
        raise ValueError(
            f"coverage cannot be said to be {required}: the operations of "
            f"{', '.join(costs.uncounted[:3])} cannot be counted; leave --require_coverage out"
        )
    _require_coverage(costs.coverage_macs, required)


def _require_coverage(found: float, required: float | None) -> None:
    if required is not None and found < required:
        raise ValueError(
            f"coverage is {found:.4f} of the MACs, below the required {required}; the lines above "
            "list what stayed in float and why"
        )

"""Test-time adaptation: one method, one file."""

from qat.tta.answer import Answer, Outcome, Refused
from qat.tta.base import Adapter, Counts, Method
from qat.tta.guard import Guard
from qat.tta.optim import SGD, Adam
from qat.tta.source import Source
from qat.tta.tent import Tent
from qat.tta.ttaq import ABL1, ABL2, ABL3, ABL4, ABL1e

__all__ = [
    "SGD",
    "ABL1",
    "ABL2",
    "ABL3",
    "ABL4",
    "ABL1e",
    "Adam",
    "Adapter",
    "Answer",
    "Counts",
    "Guard",
    "Method",
    "Outcome",
    "Refused",
    "Source",
    "Tent",
]

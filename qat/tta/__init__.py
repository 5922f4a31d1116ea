"""Test-time adaptation: one method, one file."""

from qat.tta.adapter import Adapter, Counts
from qat.tta.answer import Answer, Outcome, Refused
from qat.tta.base import Method
from qat.tta.cotta import CoTTA
from qat.tta.desk import Desk
from qat.tta.eata import EATA
from qat.tta.foa import FOA
from qat.tta.guard import Guard
from qat.tta.lame import LAME
from qat.tta.norm import Norm
from qat.tta.optim import SGD, Adam
from qat.tta.rdumb import RDumb
from qat.tta.rotta import RoTTA
from qat.tta.sar import SAR
from qat.tta.source import Source
from qat.tta.tent import Tent
from qat.tta.ttaq import ABL1, ABL2, ABL3, ABL4, ABL1e

__all__ = [
    "ABL1",
    "ABL2",
    "ABL3",
    "ABL4",
    "EATA",
    "FOA",
    "LAME",
    "SAR",
    "SGD",
    "ABL1e",
    "Adam",
    "Adapter",
    "Answer",
    "CoTTA",
    "Counts",
    "Desk",
    "Guard",
    "Method",
    "Norm",
    "Outcome",
    "RDumb",
    "Refused",
    "RoTTA",
    "Source",
    "Tent",
]

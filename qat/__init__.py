"""The core: specs, quantizers, plans, conversion, calibration and checkpoints."""

from qat.calibrate import Initialiser, calibrate, observing
from qat.checkpoint import load, save
from qat.convert import convert_
from qat.models import timm_model
from qat.plan import Plan, Rule
from qat.quantizers import Phase, Quantizer, set_phase
from qat.spec import Granularity, Operand, QuantSpec

__all__ = [
    "Granularity",
    "Initialiser",
    "Operand",
    "Phase",
    "Plan",
    "QuantSpec",
    "Quantizer",
    "Rule",
    "calibrate",
    "convert_",
    "load",
    "observing",
    "save",
    "set_phase",
    "timm_model",
]

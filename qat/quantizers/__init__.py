"""Quantizers: one method, one file."""

from qat.quantizers.affine import Affine
from qat.quantizers.base import (
    Codes,
    Factory,
    Phase,
    Quantizer,
    QuantizerFactory,
    quantizers,
    set_phase,
)
from qat.quantizers.companding import Companding
from qat.quantizers.dynamic import DynamicToken
from qat.quantizers.log import Log2, LogSqrt2
from qat.quantizers.lsq import LSQ
from qat.quantizers.observers import (
    MSE,
    MinMax,
    Observer,
    ObserverFactory,
    Percentile,
)
from qat.quantizers.per_operand import PerOperand
from qat.quantizers.percentile_mse import PercentileMSE
from qat.quantizers.tanq import TanQ
from qat.quantizers.twin_log import TwinLog

__all__ = [
    "LSQ",
    "MSE",
    "Affine",
    "Codes",
    "Companding",
    "DynamicToken",
    "Factory",
    "Log2",
    "LogSqrt2",
    "MinMax",
    "Observer",
    "ObserverFactory",
    "PerOperand",
    "Percentile",
    "PercentileMSE",
    "Phase",
    "Quantizer",
    "QuantizerFactory",
    "TanQ",
    "TwinLog",
    "quantizers",
    "set_phase",
]

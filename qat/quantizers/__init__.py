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
from qat.quantizers.lsq import LSQ
from qat.quantizers.observers import MSE, MinMax, Observer, ObserverFactory, Percentile

__all__ = [
    "LSQ",
    "MSE",
    "Affine",
    "Codes",
    "Factory",
    "MinMax",
    "Observer",
    "ObserverFactory",
    "Percentile",
    "Phase",
    "Quantizer",
    "QuantizerFactory",
    "quantizers",
    "set_phase",
]

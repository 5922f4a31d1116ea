"""Metrics of sensitivity, one idea a file."""

from qat.search.metrics.divergence import OutputDivergence
from qat.search.metrics.hessian import HessianTrace
from qat.search.metrics.removal import Removal
from qat.search.metrics.taylor import DiagonalFisher, FirstOrder, TaylorRemoval, TokenFisher

__all__ = [
    "DiagonalFisher",
    "FirstOrder",
    "HessianTrace",
    "OutputDivergence",
    "Removal",
    "TaylorRemoval",
    "TokenFisher",
]

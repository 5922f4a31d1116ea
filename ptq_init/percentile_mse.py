"""Percentile-MSE calibration: of a few quantile ranges, the one of least squared error.

The search of RepQ-ViT (`qat.quantizers.PercentileMSE`) without its reparametrization: what remains
of the method when LayerNorm outputs keep one scale for all channels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from torch import nn

from ptq_init.minmax import calibrate_by
from qat.calibrate import Batch
from qat.journal import Journal
from qat.quantizers import PercentileMSE


@dataclass(frozen=True)
class PercentileMSERange:
    """The initialiser.

    Attributes:
        per_token: Weight the error of each token by its inverse energy, see `PercentileMSE`.
    """

    per_token: bool = False

    def __call__(
        self, model: nn.Module, batches: Iterable[Batch], journal: Journal | None = None
    ) -> None:
        """Calibrate a converted model; all batches count as one."""
        calibrate_by(model, batches, partial(PercentileMSE, per_token=self.per_token))

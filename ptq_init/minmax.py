"""Min-max calibration: every range from the smallest to the largest value seen. The baseline.

Quantizers are calibrated in the order of execution, as in RepQ-ViT's pipeline, so that the methods
differ in nothing but their idea. Quantizers without an observer, such as those of attention maps in
log form, choose their own scale.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from qat.calibrate import Batch, calibrate_in_order, joined, observed_by, untouched_on_error
from qat.journal import Journal
from qat.quantizers import MinMax, ObserverFactory, Phase, set_phase


@dataclass(frozen=True)
class MinMaxRange:
    """The initialiser."""

    def __call__(
        self, model: nn.Module, batches: Iterable[Batch], journal: Journal | None = None
    ) -> None:
        """Calibrate a converted model; all batches count as one."""
        calibrate_by(model, batches, MinMax)


def calibrate_by(
    model: nn.Module, batches: Iterable[Batch], make_observer: ObserverFactory
) -> None:
    """Calibrate every quantizer of a converted model anew, in order, by one kind of observer.

    Raises:
        ValueError: If there is no batch, or one is not finite; the model is then unchanged.
    """
    batch = joined(batches)
    with untouched_on_error(model), observed_by(model, make_observer):
        set_phase(model, Phase.FLOAT)
        calibrate_in_order(model, batch)

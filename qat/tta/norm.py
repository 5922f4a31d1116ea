"""Norm: batch normalization by the statistics of the test batch, nothing trained.

Schneider et al., NeurIPS 2020, https://arxiv.org/abs/2006.16971: a batch of n counts as n, the
training statistics as `prior` images. Provenance: textbook.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat.tta.answer import State, Step
from qat.tta.base import Method
from qat.tta.norms import BatchStatistics, batch_norms
from qat.tta.overlay import Overlay


@dataclass(frozen=True)
class Norm(Method):
    """Mixes statistics of the batch into those of training.

    Attributes:
        prior: Images that the training statistics count as; 0 drops them.
    """

    adapts: ClassVar[bool] = False

    prior: int = 16

    def parameters(self, model: nn.Module) -> list[str]:
        """None.

        Raises:
            ValueError: If the model has no batch normalization, so that the method does nothing.
        """
        if not batch_norms(model):
            raise ValueError(
                "qat.tta.Norm needs batch normalization, which this model has not; use "
                "qat.tta.Source, or a method that trains LayerNorm such as qat.tta.Tent"
            )
        return []

    def start(self, on: Overlay, calibration: Iterable[Tensor]) -> State:
        """No state."""
        return {}

    def predict(self, on: Overlay, state: State, images: Tensor) -> Float[Tensor, "n c"]:
        """Logits under the mixed statistics."""
        share = len(images) / (len(images) + self.prior)
        return on(on.flat(), images, BatchStatistics(share))

    def step(self, on: Overlay, state: State, images: Tensor, generator: torch.Generator) -> Step:
        """Answer."""
        with torch.no_grad():
            return Step(self.predict(on, state, images), state, num_forward=len(images))

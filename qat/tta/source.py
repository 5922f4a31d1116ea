"""No adaptation: the floor that every method is measured against."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from qat.tta.answer import State, Step
from qat.tta.base import Method
from qat.tta.overlay import Overlay


@dataclass(frozen=True)
class Source(Method):
    """Answers by the model as it is."""

    adapts: ClassVar[bool] = False

    def start(self, on: Overlay, calibration: Iterable[Tensor]) -> State:
        """No state."""
        return {}

    def predict(self, on: Overlay, state: State, images: Tensor) -> Float[Tensor, "n c"]:
        """Logits of the model."""
        return on(on.flat(), images)

    def step(self, on: Overlay, state: State, images: Tensor, generator: torch.Generator) -> Step:
        """Answer."""
        with torch.no_grad():
            return Step(self.predict(on, state, images), state, num_forward=len(images))

"""Methods of test-time adaptation: frozen values whose steps make a new state from an old one.

A method keeps nothing itself: which parameters it adapts, how its state starts, and how one step
goes. It never changes the state that it is given; `qat.tta.adapter` runs it on a stream.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat.tta.answer import State, Step
from qat.tta.overlay import Overlay


class Method(ABC):
    """A method of adaptation; subclasses are frozen dataclasses of its settings."""

    adapts: ClassVar[bool] = True
    """Whether steps can change the state; False for methods without one."""

    def parameters(self, model: nn.Module) -> list[str]:
        """Names of the model's parameters that are adapted.

        Raises:
            ValueError: If the model has nothing that the method could work on.
        """
        return []

    @abstractmethod
    def start(self, on: Overlay, calibration: Iterable[Tensor]) -> State:
        """The state before the first batch.

        Args:
            on: The model under the adapted parameters.
            calibration: Batches of clean images, without labels, from where the model comes from.

        Raises:
            ValueError: If the model or the images do not suit the method.
        """

    @abstractmethod
    def step(self, on: Overlay, state: State, images: Tensor, generator: torch.Generator) -> Step:
        """Answer a batch and adapt to it.

        Args:
            on: The model under the adapted parameters.
            state: The present state; it must not be changed in place.
            images: (N, channels, height, width), finite.
            generator: Random numbers, seeded by the adapter's seed and the batch's number.

        Raises:
            FloatingPointError: If a loss or a gradient is not finite.
        """

    @abstractmethod
    def predict(self, on: Overlay, state: State, images: Tensor) -> Float[Tensor, "n c"]:
        """Answer a batch by a state, without adapting."""

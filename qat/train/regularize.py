"""What acts on latent weights beside the loss: the seam of GRS and other cures for oscillation."""

from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class Regularizer(Protocol):
    """Adjusts gradients before, and weights after, each optimizer step."""

    def adjust_gradients(self, model: nn.Module, progress: float) -> None:
        """Change gradients in place, after backward.

        Args:
            model: The converted model.
            progress: Share of the optimizer steps done, 0 to 1.
        """
        ...

    def adjust_weights(self, model: nn.Module, lr: float, progress: float) -> None:
        """Change weights in place, after the optimizer's step.

        Args:
            model: The converted model.
            lr: The optimizer's current learning rate.
            progress: Share of the optimizer steps done, 0 to 1.
        """
        ...

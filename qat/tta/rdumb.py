"""RDumb: a method that starts anew every so many batches, ETA in the paper.

Press, Schneider, Kuemmerer, Bethge. NeurIPS 2023. https://arxiv.org/abs/2306.05401

The sanity check of continual adaptation: what does not beat it is no contribution.
Provenance: description in the authors' repository of CCC.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat.tta.answer import State, Step
from qat.tta.base import Method
from qat.tta.eata import EATA
from qat.tta.overlay import Overlay
from qat.tta.parts import part, with_part


@dataclass(frozen=True)
class RDumb(Method):
    """Runs another method and resets it.

    Attributes:
        method: What adapts.
        period: Batches between two resets.
    """

    method: Method = EATA(anchor=0.0)  # noqa: RUF009 - a frozen value
    period: int = 1000

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"period must be at least 1 batch, got {self.period}")

    def parameters(self, model: nn.Module) -> list[str]:
        """Those of the method."""
        return self.method.parameters(model)

    def start(self, on: Overlay, calibration: Iterable[Tensor]) -> State:
        """That of the method, and a count of batches."""
        return with_part({"batches": torch.zeros(())}, "inner", self.method.start(on, calibration))

    def predict(self, on: Overlay, state: State, images: Tensor) -> Float[Tensor, "n c"]:
        """As the method."""
        return self.method.predict(on, part(state, "inner"), images)

    def step(self, on: Overlay, state: State, images: Tensor, generator: torch.Generator) -> Step:
        """A step of the method; the last of a period asks for a reset."""
        step = self.method.step(on, part(state, "inner"), images, generator)
        batches = state["batches"] + 1
        reset = f"{self.period} batches are over" if batches >= self.period else step.reset
        return replace(
            step, state=with_part({"batches": batches}, "inner", step.state), reset=reset
        )

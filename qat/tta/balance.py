"""Where class balance enters a loss: what methods call for entropy and cross-entropy."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from qat.tta.answer import State
from qat.tta.ops import cross_entropy, entropy


class Balance(ABC):
    """Losses of N predictions over C classes; subclasses are frozen dataclasses."""

    @abstractmethod
    def start(self, num_classes: int) -> State:
        """The state before the first batch."""

    @abstractmethod
    def update(self, state: State, logits: Float[Tensor, "n c"]) -> State:
        """Take in the predictions of a batch, before its loss."""

    @abstractmethod
    def alone(self, state: State, logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
        """The loss of predictions by themselves, in place of their entropy."""

    @abstractmethod
    def against(
        self, state: State, logits: Float[Tensor, "n c"], target: Float[Tensor, "n c"]
    ) -> Float[Tensor, " n"]:
        """The loss against given distributions, in place of cross-entropy."""

    @abstractmethod
    def answer(self, state: State, logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """What is answered, in place of the logits."""


@dataclass(frozen=True)
class Plain(Balance):
    """No balance: entropy, cross-entropy and logits as they are."""

    def start(self, num_classes: int) -> State:
        """Nothing is kept."""
        return {}

    def update(self, state: State, logits: Float[Tensor, "n c"]) -> State:
        """Nothing is kept."""
        return state

    def alone(self, state: State, logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
        """Entropy."""
        return entropy(logits)

    def against(
        self, state: State, logits: Float[Tensor, "n c"], target: Float[Tensor, "n c"]
    ) -> Float[Tensor, " n"]:
        """Cross-entropy."""
        return cross_entropy(logits, target)

    def answer(self, state: State, logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """The logits."""
        return logits

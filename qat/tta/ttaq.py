"""TTAQ online: adaptive balance loss (ABL), which adjusts logits by class frequency and complexity.

Xiao, Li, Yang, Mei, Gu. TTAQ: Towards Stable Post-training Quantization in Continuous Domain
Adaptation. https://arxiv.org/abs/2412.09899

*Reconstructed*: only the abstract is certain (logits are adjusted by the frequency and complexity
of classes, during optimization). What follows is ours. Statistics of the raw predictions:

    pi_c   <- m pi_c + (1 - m) mean over the batch of softmax(z)_c            start 1 / C
    kap_c  <- m kap_c + (1 - m) mean of H(p) / ln C over images predicted c   kept if none is
    o_c    = tau ln(C pi_c + eps) - gamma (kap_c - mean kap)                  detached

Candidates, each in the place of a method's entropy, or of its cross-entropy with a target q:

    ABL1    CE(z + o, argmax z)                     CE(z + o, q)
    ABL1e   H(softmax(z + sign o))                  CE(z + o, q)
    ABL2    as ABL1 with o_c = tau ln(pi_c (1 - kap_c) / Z), Z the mean over classes
    ABL3    H(softmax(z)) w, w = (1 + kap_y) / (C pi_y), y = argmax z, w scaled to mean 1
                                                    CE(z, q) w
    ABL4    losses as they are; answers z - o

`docs/archive/log_2026-11.md` has the experiment on held-out corruptions that chose the recipes'
form. The other two thirds of TTAQ, PEM and PCR, are losses of calibration.
"""

from abc import abstractmethod
from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qat.tta.answer import State
from qat.tta.balance import Balance
from qat.tta.ops import cross_entropy, entropy, moved, one_hot

EPS = 1e-3


@dataclass(frozen=True)
class ABL(Balance):
    """What the candidates share: the statistics.

    Attributes:
        tau: Weight of the frequency.
        gamma: Weight of the complexity.
        memory: Share m of the statistics that a batch leaves.
    """

    tau: float = 0.25
    gamma: float = 0.25
    memory: float = 0.95

    def start(self, num_classes: int) -> State:
        """All classes alike."""
        frequency = torch.full((num_classes,), 1 / num_classes)
        return {"frequency": frequency, "complexity": torch.full((num_classes,), 0.5)}

    def update(self, state: State, logits: Float[Tensor, "n c"]) -> State:
        """Move frequency and complexity towards those of the batch."""
        share, num_classes = 1 - self.memory, logits.shape[1]
        members = one_hot(logits.argmax(1), num_classes)
        count = members.sum(0)
        mean = (entropy(logits) / log(num_classes)) @ members / count.clamp(min=1)
        complexity = moved(state["complexity"], mean, share)
        return {
            "frequency": moved(state["frequency"], logits.softmax(1).mean(0), share),
            "complexity": torch.where(count > 0, complexity, state["complexity"]),
        }

    def offset(self, state: State) -> Float[Tensor, " c"]:
        """The adjustment o of the logits."""
        return offset(state["frequency"], state["complexity"], self.tau, self.gamma)

    @abstractmethod
    def alone(self, state: State, logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
        """In place of entropy."""

    def against(
        self, state: State, logits: Float[Tensor, "n c"], target: Float[Tensor, "n c"]
    ) -> Float[Tensor, " n"]:
        """Cross-entropy of the adjusted logits."""
        return cross_entropy(logits + self.offset(state), target)

    def answer(self, state: State, logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """The logits as they are."""
        return logits


def offset(
    frequency: Float[Tensor, " c"], complexity: Float[Tensor, " c"], tau: float, gamma: float
) -> Float[Tensor, " c"]:
    """`tau ln(C pi + eps) - gamma (kap - mean kap)`: large for frequent, easy classes."""
    rarity = (len(frequency) * frequency + EPS).log()
    return tau * rarity - gamma * (complexity - complexity.mean())


def predicted(logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """The predicted classes as distributions, without gradient."""
    return one_hot(logits.detach().argmax(1), logits.shape[1])


@dataclass(frozen=True)
class ABL1(ABL):
    """Cross-entropy of the adjusted logits with the raw prediction."""

    def alone(self, state: State, logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
        """The predicted class is the target."""
        return self.against(state, logits, predicted(logits))


@dataclass(frozen=True)
class ABL1e(ABL):
    """Entropy of the adjusted logits.

    Attributes:
        sign: Of the adjustment; the argument on paper for either is in the notes of the log.
    """

    sign: Literal[-1, 1] = 1

    def alone(self, state: State, logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
        """Entropy of the softmax of `z + sign o`."""
        return entropy(logits + self.sign * self.offset(state))


@dataclass(frozen=True)
class ABL2(ABL):
    """`ABL1` with one prior of both statistics; `gamma` has no part in it."""

    def alone(self, state: State, logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
        """The predicted class is the target."""
        return self.against(state, logits, predicted(logits))

    def offset(self, state: State) -> Float[Tensor, " c"]:
        """`tau ln(pi (1 - kap) / Z)`."""
        prior = state["frequency"] * (1 - state["complexity"]) + EPS / len(state["frequency"])
        return self.tau * (prior / prior.mean()).log()


@dataclass(frozen=True)
class ABL3(ABL):
    """Weights of images by the class predicted; `tau` and `gamma` have no part in it."""

    def alone(self, state: State, logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
        """Weighted entropy."""
        return self._weights(state, logits) * entropy(logits)

    def against(
        self, state: State, logits: Float[Tensor, "n c"], target: Float[Tensor, "n c"]
    ) -> Float[Tensor, " n"]:
        """Weighted cross-entropy."""
        return self._weights(state, logits) * cross_entropy(logits, target)

    def _weights(self, state: State, logits: Tensor) -> Float[Tensor, " n"]:
        classes = logits.detach().argmax(1)
        frequency = state["frequency"] * logits.shape[1] + EPS
        weights = ((1 + state["complexity"]) / frequency)[classes]
        return weights / weights.mean()


@dataclass(frozen=True)
class ABL4(ABL):
    """Losses as they are; the adjustment is taken off the answer."""

    def alone(self, state: State, logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
        """Entropy."""
        return entropy(logits)

    def against(
        self, state: State, logits: Float[Tensor, "n c"], target: Float[Tensor, "n c"]
    ) -> Float[Tensor, " n"]:
        """Cross-entropy."""
        return cross_entropy(logits, target)

    def answer(self, state: State, logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """`z - o`."""
        return logits - self.offset(state)

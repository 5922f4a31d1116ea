"""EATA: efficient test-time adaptation without forgetting.

Niu, Wu, Zhang, Chen, Zheng, Zhao, Tan. ICML 2022. https://arxiv.org/abs/2204.02610

    kept     H(p) < E0 = margin ln C  and  |cos(m, p)| < d, m the moving mean of kept p
    loss     mean over kept of exp(E0 - H) H, the weight detached
             + alpha sum_i F_i (theta_i - theta_i^0)^2
    m        <- 0.9 m + 0.1 mean of kept p; the first batch sets it
    F        squared gradient of the cross-entropy with the model's own classes, mean over batches
             of clean images; alpha 0 is the method's variant ETA

Settings: d 0.05 for 1000 classes, 0.4 for 10; alpha 2000 for ImageNet, 1 for CIFAR-10.
Deviations: F comes from the calibration images, 32 in the recipes where the paper has 2,000; the
official reset keeps m, here it is state like all else.
Provenance: the authors' code, commit f739b36.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import log

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from qat.models import num_classes_of
from qat.tta.answer import State, Step
from qat.tta.gradient import GradientMethod, gradient
from qat.tta.ops import cross_entropy, entropy, moved, one_hot
from qat.tta.overlay import Overlay
from qat.tta.parts import part

KEEP = 0.1
"""Share of a batch in the moving mean of predictions."""


@dataclass(frozen=True)
class EATA(GradientMethod):
    """Descends the entropy of reliable predictions that are not redundant, near the start.

    Attributes:
        margin: Entropy below which a prediction is reliable, as a share of ln C.
        similarity: Cosine d with the mean prediction from which a prediction is redundant.
        anchor: Weight alpha of the distance from the start; 0 is ETA.
    """

    margin: float = 0.4
    similarity: float = 0.4
    anchor: float = 1.0

    def start(self, on: Overlay, calibration: Iterable[Tensor]) -> State:
        """The Fisher information of the start, and no mean prediction.

        Raises:
            ValueError: If `anchor` is set and there are no calibration images.
        """
        state = {**super().start(on, calibration), "mean": torch.zeros(num_classes_of(on.model))}
        if self.anchor:
            state |= {"anchor": state["params"], "fisher": self._fisher(on, state, calibration)}
        return state

    def _fisher(self, on: Overlay, state: State, batches: Iterable[Tensor]) -> Float[Tensor, " p"]:
        squares = []
        for images in batches:
            params, logits, _, _ = self.forward(on, state, images)
            target = one_hot(logits.detach().argmax(1), logits.shape[1])
            grad = gradient(lambda z=logits, q=target: cross_entropy(z, q).mean(), params)
            squares.append(grad.square())
        if not squares:
            raise ValueError(
                "EATA with an anchor needs calibration images; give some, or set anchor to 0 (ETA)"
            )
        return torch.stack(squares).mean(0)

    def step(self, on: Overlay, state: State, images: Tensor, generator: torch.Generator) -> Step:
        """One step over the images that are kept; none if there are none."""
        params, logits, state, answer = self.forward(on, state, images)
        kept, mean = selected(logits.detach(), state["mean"], self.margin, self.similarity)
        n, chosen = len(images), int(kept.sum())
        if not chosen:
            return Step(answer, state, num_forward=n)
        balance = part(state, "balance")

        def loss() -> Tensor:
            certain = logits[kept]
            weights = (self.margin * log(logits.shape[1]) - entropy(certain.detach())).exp()
            value = (weights * self.balance.alone(balance, certain)).mean()
            if self.anchor:
                distance = (state["fisher"] * (params - state["anchor"]).square()).sum()
                value = value + self.anchor * distance
            return value

        state = self.descend({**state, "mean": mean}, gradient(loss, params))
        return Step(answer, state, chosen, num_forward=n, num_backward=chosen)


def selected(
    logits: Float[Tensor, "n c"], mean: Float[Tensor, " c"], margin: float, similarity: float
) -> tuple[Bool[Tensor, " n"], Float[Tensor, " c"]]:
    """Reliable, not redundant predictions, and the moving mean after them.

    Args:
        logits: Predictions.
        mean: Moving mean of probabilities; zero before the first.
        margin: Share of ln C below which an entropy is reliable.
        similarity: Cosine from which a prediction is redundant.
    """
    probabilities = logits.softmax(1)
    kept = entropy(logits) < margin * log(logits.shape[1])
    first = not mean.any()
    if not first:
        kept &= F.cosine_similarity(mean[None], probabilities).abs() < similarity
    if not kept.any():
        return kept, mean
    new = probabilities[kept].mean(0)
    return kept, new if first else moved(mean, new, KEEP)

"""LAME: parameter-free online test-time adaptation.

Boudiaf, Mueller, Ben Ayed, Bertinetto. CVPR 2022. https://arxiv.org/abs/2201.05718

    W_ij = 1 where j is one of the k nearest neighbours of i by features, itself excluded
    Y    <- softmax(ln p + W Y), from Y = p, until the energy changes by less than 1e-8 of itself
    energy  sum(-Y ln p - Y (W Y) + Y ln Y)

It corrects answers of one batch by each other and trains nothing. It helps where labels are
correlated in time and harms where they are not. Features are the classifier's input, normalized.
The variant with a Gaussian affinity gives NaN on a single image, or on equal ones, and is left out.
Provenance: the authors' code (repository fiveai/LAME).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from qat.tta.answer import State, Step
from qat.tta.base import Method
from qat.tta.overlay import Overlay


@dataclass(frozen=True)
class LAME(Method):
    """Makes neighbours agree.

    Attributes:
        neighbours: Number k of neighbours of each image.
    """

    adapts: ClassVar[bool] = False

    neighbours: int = 5

    def start(self, on: Overlay, calibration: Iterable[Tensor]) -> State:
        """No state."""
        return {}

    def predict(self, on: Overlay, state: State, images: Tensor) -> Float[Tensor, "n c"]:
        """Logarithm of the corrected probabilities."""
        found: list[Tensor] = []
        logits = on(on.flat(), images, lambda model: classifier_input(model, found))
        affinity = nearest(found[0].float().flatten(1), self.neighbours)
        return corrected(logits.log_softmax(1), affinity)

    def step(self, on: Overlay, state: State, images: Tensor, generator: torch.Generator) -> Step:
        """Answer."""
        with torch.no_grad():
            return Step(self.predict(on, state, images), state, num_forward=len(images))


def classifier_input(model: Any, found: list[Tensor]) -> None:
    """Hook that leaves what the classifier of a timm model is given in a list."""
    classifier: nn.Module = model.get_classifier()
    classifier.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))


def nearest(features: Float[Tensor, "n d"], neighbours: int) -> Float[Tensor, "n n"]:
    """1 where column j is one of the nearest neighbours of row i; the diagonal is 0."""
    n = len(features)
    features = F.normalize(features, dim=1)
    distances = (features[:, None] - features).norm(dim=2).fill_diagonal_(torch.inf)
    chosen = distances.topk(min(neighbours, n - 1), largest=False).indices
    return torch.zeros(n, n, device=features.device).scatter_(1, chosen, 1.0)


def corrected(
    log_p: Float[Tensor, "n c"], affinity: Float[Tensor, "n n"], max_iterations: int = 100
) -> Float[Tensor, "n c"]:
    """Log-probabilities at the fixed point of the iteration."""
    log_y, last = log_p, 0.0
    for iteration in range(max_iterations):
        pull = affinity @ log_y.exp()
        log_y = (log_p + pull).log_softmax(1)
        y = log_y.exp()
        energy = float((y * (log_y - log_p - affinity @ y)).sum())
        if iteration and abs(energy - last) <= 1e-8 * abs(last):
            break
        last = energy
    return log_y

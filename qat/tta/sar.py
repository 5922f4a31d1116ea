"""SAR: sharpness-aware and reliable entropy minimization.

Niu, Wu, Zhang, Wen, Chen, Zhao, Tan. ICLR 2023. https://arxiv.org/abs/2302.12400

    kept     H(p) < E0 = margin ln C
    climb    theta' = theta + rho g / |g|, g the gradient of the mean entropy of the kept
    step     from theta, by the gradient at theta' of the mean entropy of those kept that are below
             E0 there too
    recover  e <- 0.9 e + 0.1 loss at theta'; start anew if e < `floor`
    trained  normalization of all but the last quarter of the stages

Deviations: the stages are found by structure, the official code goes by timm's names. In the
official code the floor is 0.2 whatever is set, e survives the reset that it causes, and momentum
moves the weights where nothing was kept; not so here.
Provenance: the authors' code, commit 20f6e24.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import log

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat.tta.answer import State, Step
from qat.tta.gradient import GradientMethod, gradient
from qat.tta.norms import batch_norms, norm_parameters
from qat.tta.ops import entropy, moved
from qat.tta.overlay import Overlay
from qat.tta.parts import part

UNSEEN = -1.0
"""The running loss before the first step; no entropy is negative."""


@dataclass(frozen=True)
class SAR(GradientMethod):
    """Descends the entropy of reliable predictions towards flat minima.

    Attributes:
        margin: Entropy below which a prediction is reliable, as a share of ln C.
        radius: Length rho of the climb.
        floor: Running loss, in nats, below which the model has collapsed.
    """

    margin: float = 0.4
    radius: float = 0.05
    floor: float = 0.2

    def parameters(self, model: nn.Module) -> list[str]:
        """Weights and biases of normalization, but for the top."""
        return norm_parameters(model, top=False)

    def start(self, on: Overlay, calibration: Iterable[Tensor]) -> State:
        """No loss seen."""
        return {**super().start(on, calibration), "loss": torch.tensor(UNSEEN)}

    def step(self, on: Overlay, state: State, images: Tensor, generator: torch.Generator) -> Step:
        """Climb, then step; nothing where nothing is kept."""
        params, logits, state, answer = self.forward(on, state, images)
        balance, n = part(state, "balance"), len(images)
        limit = self.margin * log(logits.shape[1])
        kept = entropy(logits.detach()) < limit
        first = int(kept.sum())
        if not first:
            return Step(answer, state, num_forward=n)
        grad = gradient(lambda: self.balance.alone(balance, logits[kept]).mean(), params)
        top = climbed(params.detach(), grad, self.radius).requires_grad_()
        # Batch statistics need the whole batch, all else only the rows that are kept.
        rows = images if batch_norms(on.model) else images[kept]
        with torch.enable_grad():
            again = on(top, rows, self.hooks(on, rows))
            again = again[kept] if len(rows) == n else again
        still = entropy(again.detach()) < limit
        second = int(still.sum())
        if not second:
            return Step(answer, state, num_forward=n + len(rows), num_backward=first)
        losses = self.balance.alone(balance, again[still])
        state = self.descend(state, gradient(lambda: losses.mean(), top))
        loss = entropy(again.detach()[still]).mean()
        loss = loss if state["loss"] == UNSEEN else moved(state["loss"], loss, 0.1)
        fallen = f"running entropy {loss:.3f} is below {self.floor}" if loss < self.floor else ""
        return Step(answer, {**state, "loss": loss}, second, n + len(rows), first + second, fallen)


def climbed(
    params: Float[Tensor, " p"], grad: Float[Tensor, " p"], radius: float
) -> Float[Tensor, " p"]:
    """Parameters at distance `radius` up the gradient."""
    return params + radius * grad / grad.norm().clamp(min=1e-12)

"""A guard that compares an adapted model with the original on every batch.

The original answers every batch too, at the cost of one more forward pass. That gives a reference
without labels: a stream sorted by class makes both models predict one class, a collapse only the
adapted one. Running means over about `window` images:

    c        share of answers that differ, less the original's own doubt, 1 - max p: the adapted
             model contradicts what the original is sure of
    d        H(f_source) - H(f_adapted) in nats, f the frequencies of predicted classes: it has
             stopped to tell classes apart
    danger   max(c, 0) / margin + d / diversity, where d < 0 with 2 max(d / diversity, -1) instead

    health   1 - 4 danger, between 0 and 1
    n        sum of the health over all images since the start or the last collapse
    answer   (z_source + v (sd(z_source) / sd(z_adapted)) z_adapted) / (1 + v),
             v = w health n / (n + probation)

a mean of both at equal scale, because adaptation by entropy inflates logits. A method is heard as
far as it has proved itself: a short stream gains little by adapting and can lose, a long one gains
much. One that breaks early was hardly heard; one that a shift makes err was heard long, therefore
none is above a danger of 1/4. Above 2 it has collapsed: the method starts anew, the batch gets the
original's answer, and adaptation pauses, `pause` batches after the first collapse, four times as
many after each further.

A shift can make the original sure of a few wrong classes. To contradict that is no fault and makes
answers more diverse, which therefore excuses two margins of contradiction, but no more. Nor is a
method that fails under one shift lost to the next, so between 1/4 and 2 it goes on, unheard.

Not from a paper. The figures behind the settings are in docs/archive/log_2026-11.md.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qat.tta.answer import State
from qat.tta.ops import entropy_of, moved
from qat.tta.parts import at

UNHEARD = 0.25
"""Danger from which the adapted model is not heard."""
COLLAPSE = 2.0
"""Danger above which the adapted model has collapsed."""
EXCUSE = 2.0
"""Margins of contradiction that gained diversity excuses at the most."""


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the guard makes of a batch.

    Attributes:
        logits: The guarded answer.
        state: The guard's state after the batch.
        collapse: What shows that the adapted model has collapsed; empty if it has not.
    """

    logits: Float[Tensor, "n c"]
    state: State
    collapse: str = ""


@dataclass(frozen=True)
class Guard:
    """Mixes answers with the original's and undoes collapse.

    Attributes:
        weight: Weight w that the adapted model's logits tend to, that of the original being 1.
        window: Images over which means run.
        probation: Healthy images after which the adapted model has half that weight.
        margin: Share of answers differing beyond the original's doubt that is a danger of 1.
        diversity: Entropy, in nats, lost against the original's predictions that is a danger of 1.
        pause: Batches without adaptation after the first collapse.
    """

    weight: float = 0.5
    window: int = 100
    probation: int = 20_000
    margin: float = 0.15
    diversity: float = 0.5
    pause: int = 8

    def __post_init__(self) -> None:
        if self.weight <= 0 or min(self.window, self.probation, self.pause) < 1:
            raise ValueError(
                "a guard needs a weight above 0, or no adapted answer is ever heard, and a window, "
                f"probation and pause of at least 1, got {self.weight}, {self.window}, "
                f"{self.probation} and {self.pause}"
            )
        if self.margin <= 0 or self.diversity <= 0:
            raise ValueError(
                "a guard's margin and diversity must be above 0, got "
                f"{self.margin} and {self.diversity}"
            )

    def start(self, num_classes: int) -> State:
        """Nothing seen."""
        zero, uniform = torch.zeros(()), torch.full((num_classes,), 1 / num_classes)
        return {
            "source": uniform,
            "adapted": uniform,
            "contradiction": zero,
            "healthy": zero,
            "collapses": zero,
            "pause": zero,
        }

    def pauses(self, state: State) -> bool:
        """Whether the batch is to be answered by the original, without adapting."""
        return bool(state["pause"] > 0)

    def resume(self, state: State) -> State:
        """The state after a batch of a pause."""
        return {**state, "pause": state["pause"] - 1}

    def judge(
        self, state: State, source: Float[Tensor, "n c"], adapted: Float[Tensor, "n c"]
    ) -> Verdict:
        """Compare the answers of both models to a batch."""
        new = self.observe(state, source, adapted)
        danger = self.danger(new)
        if danger <= COLLAPSE:
            health = 1 - min(max(danger / UNHEARD, 0.0), 1.0)
            healthy = new["healthy"] + health * len(source)
            weight = self.weight * health * float(healthy / (healthy + self.probation))
            return Verdict(mixed(source, adapted, weight), {**new, "healthy": healthy})
        why = (
            f"{contradiction(new):.0%} of the answers contradict the original beyond its doubt, "
            f"and predictions have lost {lost_diversity(new):.2f} nats of diversity"
        )
        return Verdict(source, self.after_collapse(new), why)

    def danger(self, state: State) -> float:
        """How far the adapted model has come apart from the original."""
        change = lost_diversity(state) / self.diversity
        change = change if change > 0 else EXCUSE * max(change, -1.0)
        return contradiction(state) / self.margin + change

    def after_collapse(self, state: State) -> State:
        """Nothing seen but the number of collapses, and a pause ahead."""
        collapses = state["collapses"]
        fresh = at(collapses.device, self.start(len(state["source"])))
        return {**fresh, "collapses": collapses + 1, "pause": self.pause * 4**collapses}

    def observe(
        self, state: State, source: Float[Tensor, "n c"], adapted: Float[Tensor, "n c"]
    ) -> State:
        """The running means after the answers of both models to a batch."""
        num_classes = source.shape[1]
        share = share_of(len(source), self.window)
        first, second = source.argmax(1), adapted.argmax(1)
        doubt = 1 - source.softmax(1).amax(1)
        seen = {
            "source": torch.bincount(first, minlength=num_classes) / len(first),
            "adapted": torch.bincount(second, minlength=num_classes) / len(first),
            "contradiction": ((first != second).float() - doubt).mean().clamp(min=-self.margin),
        }
        return {**state, **{key: moved(state[key], value, share) for key, value in seen.items()}}


def contradiction(state: State) -> float:
    """Share of answers that differ beyond the original's doubt."""
    return max(float(state["contradiction"]), 0.0)


def lost_diversity(state: State) -> float:
    """Entropy of the original's predictions, in nats, less that of the adapted model's."""
    return float(entropy_of(state["source"]) - entropy_of(state["adapted"]))


def share_of(images: int, window: int) -> float:
    """What so many images weigh in a running mean over about `window` images."""
    return 1 - (1 - 1 / window) ** images


def mixed(
    source: Float[Tensor, "n c"], adapted: Float[Tensor, "n c"], weight: float
) -> Float[Tensor, "n c"]:
    """Weighted mean of logits at the scale of the first."""
    first = source - source.mean(1, keepdim=True)
    second = adapted - adapted.mean(1, keepdim=True)
    scale = first.square().mean().sqrt() / second.square().mean().sqrt().clamp(min=1e-12)
    return (first + weight * scale * second) / (1 + weight)

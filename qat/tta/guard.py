"""A guard that compares an adapted model with the original on every batch.

The original answers every batch too, at the cost of one more forward pass. That gives a reference
without labels: a stream sorted by class makes both models predict one class, a collapse only the
adapted one.

    collapse   H(f_source) - H(f_adapted) > `diversity`, in nats, f = running frequency of
               predicted classes; or the running share of confident answers of the original that
               the adapted model contradicts exceeds `conflict`
    answer     z_source + w (sd(z_source) / sd(z_adapted)) z_adapted, over 1 + w: the mean of both,
               at equal scale because adaptation by entropy inflates logits

Not from a paper; the figures that chose the settings are in docs/log.md.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qat.tta.answer import State
from qat.tta.ops import entropy_of, moved


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
    """Mixes answers with the original's and detects collapse.

    Attributes:
        weight: Weight w of the adapted model's logits, that of the original being 1.
        window: Images over which frequencies are kept.
        diversity: Entropy, in nats, that predictions may lose against the original's.
        conflict: Share of the original's confident answers that may be contradicted.
        confident: Probability from which an answer of the original is confident.
    """

    weight: float = 1.0
    window: int = 200
    diversity: float = 0.5
    conflict: float = 0.25
    confident: float = 0.7

    def start(self, num_classes: int) -> State:
        """Nothing seen."""
        uniform = torch.full((num_classes,), 1 / num_classes)
        return {"source": uniform, "adapted": uniform, "conflict": torch.zeros(())}

    def judge(
        self, state: State, source: Float[Tensor, "n c"], adapted: Float[Tensor, "n c"]
    ) -> Verdict:
        """Compare the answers of both models to a batch."""
        new = self._observe(state, source, adapted)
        logits = mixed(source, adapted, self.weight)
        lost = float(entropy_of(new["source"]) - entropy_of(new["adapted"]))
        if lost > self.diversity:
            return Verdict(logits, new, f"predictions lost {lost:.2f} nats of diversity")
        if (share := float(new["conflict"])) > self.conflict:
            return Verdict(logits, new, f"{share:.0%} of confident answers are contradicted")
        return Verdict(logits, new)

    def _observe(self, state: State, source: Tensor, adapted: Tensor) -> State:
        num_classes = source.shape[1]
        share = 1 - (1 - 1 / self.window) ** len(source)
        first, second = source.argmax(1), adapted.argmax(1)
        histograms = {
            name: torch.bincount(classes, minlength=num_classes) / len(classes)
            for name, classes in (("source", first), ("adapted", second))
        }
        new = {key: moved(state[key], seen, share) for key, seen in histograms.items()}
        sure = source.softmax(1).amax(1) > self.confident
        rate = 1 - (1 - 1 / self.window) ** float(sure.sum())
        contradicted = ((first != second) & sure).sum() / sure.sum().clamp(min=1)
        return {**new, "conflict": moved(state["conflict"], contradicted, rate)}


def mixed(
    source: Float[Tensor, "n c"], adapted: Float[Tensor, "n c"], weight: float
) -> Float[Tensor, "n c"]:
    """Weighted mean of logits at the scale of the first."""
    first = source - source.mean(1, keepdim=True)
    second = adapted - adapted.mean(1, keepdim=True)
    scale = first.square().mean().sqrt() / second.square().mean().sqrt().clamp(min=1e-12)
    return (first + weight * scale * second) / (1 + weight)

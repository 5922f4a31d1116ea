"""What ails a quantized training: each fault that shows in its numbers, and what to try.

Every function looks at measurements of one kind and gives a diagnosis, or None where all is well.
Thresholds are ours: far from what healthy runs of the shipped recipes show.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from qat.quantizers import LSQ, Affine

DEAD = 1e-3
"""Share of its starting size below which a scale counts as dead."""
LARGEST_CLIPPED = {2: 0.8, 3: 0.6}
"""Share of an operand's values that may lie outside of its grid, by bits."""
CLIPPED = 0.4
"""The same share for operands of other bits."""
LEAST_FALL = 0.02
"""Share of its first value by which the loss of a training has to fall."""
LEAST_STEPS = 30
"""Steps in which the loss of a batch is too noisy to say whether it falls."""
FROZEN = 0.02
"""Share of the first epoch's flips, at a like learning rate, below which signs are frozen."""
STILL = 1e-6
"""Share of signs that flip in a step below which nothing moves at all."""
INITIALISER = "ptq_init.percentile_mse.PercentileMSERange"
"""What finds ranges by their error."""
WORSE = 1.1
"""How many times the loss of the trained weights that of their average may be."""


@dataclass(frozen=True)
class Diagnosis:
    """One fault.

    Attributes:
        fault: Its name, said once in a run.
        cause: What is wrong.
        evidence: The numbers that show it.
        layer: The layer that shows it most; empty where it is no matter of a layer.
        suggestion: A flag of `fit` to try.
    """

    fault: str
    cause: str
    evidence: str
    layer: str
    suggestion: str

    def __str__(self) -> str:
        where = f", first {self.layer}" if self.layer else ""
        return f"{self.cause}: {self.evidence}{where}; try {self.suggestion}"

    def items(self) -> dict[str, str]:
        """As a row of a table."""
        return asdict(self)


def signs_of_scales(
    scales: Mapping[str, Tensor], starts: Mapping[str, Tensor], lr: float
) -> Diagnosis | None:
    """Trained scales that are zero, negative or dead: steps of a grid are positive.

    Args:
        scales: Now, by name of the quantizer.
        starts: When training began, positive.
        lr: Learning rate.
    """
    broken = {name: scale <= DEAD * starts[name].abs() for name, scale in scales.items()}
    count = sum(int(found.sum()) for found in broken.values())
    if not count:
        return None
    total = sum(scale.numel() for scale in scales.values())
    negative = sum(int((scale < 0).sum()) for scale in scales.values())
    layer = next(name for name, found in broken.items() if found.any())
    lowest = float(scales[layer].min())
    return Diagnosis(
        "scales",
        "the learning rate drives trained scales through zero",
        f"{count} of {total} are below a thousandth of their start, {negative} of them negative, "
        f"the lowest {lowest:.2g} from a mean of {float(starts[layer].mean()):.2g}",
        layer,
        _lower_rate(lr),
    )


def saturation(
    clipped: Mapping[str, tuple[int, float]], lr: float | None = None
) -> Diagnosis | None:
    """Operands too many of whose values lie outside of their grid.

    Args:
        clipped: Bits, and the share of values outside, by name of the quantizer.
        lr: Learning rate that led there; None where training has not begun.
    """
    found = {
        name: share
        for name, (bits, share) in clipped.items()
        if share > LARGEST_CLIPPED.get(bits, CLIPPED)
    }
    if not found:
        return None
    layer = max(found, key=lambda name: found[name])
    return Diagnosis(
        "saturation",
        "grids are too narrow for their values",
        f"{len(found)} of {len(clipped)} operands clip too many, up to {found[layer]:.0%}",
        layer,
        f"--init {INITIALISER}" if lr is None else _lower_rate(lr),
    )


def not_finite(step: int, layer: str, begins_here: bool, precision: str) -> Diagnosis:
    """A loss that is NaN or infinite.

    Args:
        step: At which it appeared.
        layer: The first whose output is not finite; empty where only the loss is not.
        begins_here: Whether its inputs and weights are finite.
        precision: Of the trainer.
    """
    what = "from inputs and weights that are finite" if begins_here else "from what is not finite"
    flag = "--trainer.gradient_clip_val 1" if "16" not in precision else "--trainer.precision 32"
    evidence = f"at step {step}, {what}"
    return Diagnosis("not_finite", "the loss is not finite", evidence, layer, flag)


def decay_of_scales(decays: Mapping[str, float]) -> Diagnosis | None:
    """Weight decay that pulls scales to zero.

    Args:
        decays: Of every scale, by name.
    """
    found = {name: decay for name, decay in decays.items() if decay}
    if not found:
        return None
    layer = next(iter(found))
    return Diagnosis(
        "decay_of_scales",
        "weight decay pulls trained scales to zero",
        f"the optimizer decays {len(found)} of {len(decays)} by {found[layer]:g}",
        layer,
        "--model.optimizer.init_args.weight_decay 0",
    )


def averaging(trained: float, averaged: float) -> Diagnosis | None:
    """An average of weights that is worse than the weights.

    Args:
        trained: Loss of a batch by the weights as trained.
        averaged: Loss of the same batch by their average.
    """
    if averaged <= WORSE * trained:
        return None
    evidence = f"a training batch has loss {averaged:.3g} by it and {trained:.3g} without"
    cause = "the average of the weights, which is what is kept, is worse than the weights"
    return Diagnosis("averaging", cause, evidence, "", "--trainer.callbacks null")


def plateau(losses: Sequence[float], num_steps: int, lr: float) -> Diagnosis | None:
    """A loss that does not fall, as binary networks have it that never begin to learn.

    Args:
        losses: Mean training loss of each epoch.
        num_steps: Optimizer steps in all of them.
        lr: Learning rate.
    """
    early = len(losses) < 3 or num_steps < LEAST_STEPS
    if early or min(losses[1:]) <= (1 - LEAST_FALL) * losses[0]:
        return None
    rises = losses[-1] > losses[0]
    flag = _lower_rate(lr) if rises else f"--model.optimizer.init_args.lr {3 * lr:.2g}"
    evidence = f"{losses[0]:.4g} in the first epoch, {losses[-1]:.4g} in epoch {len(losses)}"
    return Diagnosis("plateau", "the loss of one bit does not fall", evidence, "", flag)


def frozen_signs(
    flip_rates: Sequence[float], rates: Sequence[float], strength: float
) -> Diagnosis | None:
    """Signs that a regularizer holds where they are, so that training cannot move them.

    Epochs whose learning rate is below a tenth of the first one's say nothing.

    Args:
        flip_rates: Share of the signs that flip in a step, by epoch.
        rates: Mean learning rate of each of these epochs, to which flips are in proportion.
        strength: Of the regularizer; 0 for none.
    """
    epochs = list(zip(flip_rates, rates, strict=False))
    judged = [(flips, rate) for flips, rate in epochs if 0 < 0.1 * rates[0] <= rate]
    if not judged or not strength:
        return None
    (first, first_rate), (last, rate) = judged[0], judged[-1]
    if first > STILL and last / rate > FROZEN * first / first_rate:
        return None
    flag = f"--model.regularizer.init_args.strength {strength / 10:.2g}"
    evidence = f"{last:.1e} of them flip in a step, {first:.1e} in the first epoch"
    return Diagnosis("frozen_signs", "GRS is so strong that signs are frozen", evidence, "", flag)


@torch.no_grad()
def clipped_share(quantizer: Affine | LSQ, x: Tensor) -> float:
    """Share of the values of an operand that lie outside of its grid."""
    gap = (x.detach() - quantizer.fake_quantize(x.detach())).abs()
    return float((gap > 0.501 * quantizer.scale.detach().abs()).float().mean())


def _lower_rate(lr: float) -> str:
    """The flag for a tenth of the learning rate."""
    return f"--model.optimizer.init_args.lr {lr / 10:.2g}"

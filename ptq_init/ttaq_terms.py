"""The forms of PEM and PCR that TTAQ's abstract leaves open, as terms of the reconstruction.

PEM (perturbation error mitigation). With W^ the quantized weight of a layer, W its weight when
training began, and e the error of its input, from quantization before it and from the domain:

    W^ (x + e) - W x = (W^ - W) x + W^ e
    E || W^ (x + e) - W x ||^2 = || (W^ - W) x ||^2 + tr(W^ S W^^T),   S = E e e^T

Reconstruction sees the first part only. What is added to it, a mean over the layers of a stage:

    A           mean(W^^2)                        S = s^2 I: no input error is amplified
    A-relative  mean_o(|W^_o|^2 / |W_o|^2)        each output channel by itself, before a BatchNorm
    B           mean((W^ - W)^2)                  only what quantization adds to the amplification
    C           tr(W^ S W^^T) / numel(W)          S diagonal, measured on perturbed images
    D           |W^|_2^2 / numel(W)               the direction that is amplified most
    E           error of the output on x + n, n normal, a share of the deviation of each value

PCR (perturbation consistency reconstruction). With z^ the output of the quantized stage, z that of
the float one, x' the perturbed image, d the error of the reconstruction:

    1           d(z^(x), z^(x')), on logits the divergence of the two predictions
    2           d between two runs on the same input with other random drops (QDrop)
    3           d(z(x), z^(x'))
    1+3         both
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from qat.reconstruct.terms import OutputError, Probe, QuantizedWeight, Step, Term

Penalty = Callable[[QuantizedWeight], Tensor]
POWER_ITERATIONS = 20


def size(weight: QuantizedWeight) -> Tensor:
    """A: mean square."""
    return weight.value.square().mean()


def relative_size(weight: QuantizedWeight) -> Tensor:
    """A-relative: squared norm of each output channel over what it was, the mean of them."""
    now, before = (w.flatten(1).square().sum(1) for w in (weight.value, weight.start))
    return (now / before.clamp(min=1e-12)).mean()


def added_size(weight: QuantizedWeight) -> Tensor:
    """B: mean square of what quantization and training have changed."""
    return (weight.value - weight.start).square().mean()


def measured_gain(weight: QuantizedWeight) -> Tensor:
    """C: each input channel counts by the mean squared error measured on it.

    Raises:
        ValueError: If there is no perturbation to measure it with.
    """
    if weight.shift is None:
        raise ValueError("PEM-C measures input errors on perturbed images; set `perturb`")
    value = weight.value
    groups = getattr(weight.layer, "groups", 1)
    each = len(value) // groups
    shift = repeat(weight.shift, "(groups i) -> (groups o) i", groups=groups, o=each)
    energy = rearrange(value.square(), "o i ... -> o i (...)").sum(2)
    return (energy * shift).sum() / value.numel()


def largest_gain(weight: QuantizedWeight) -> Tensor:
    """D: squared spectral norm, by power iteration, over the number of weights."""
    value = weight.value.flatten(1)
    with torch.no_grad():
        right = value.sum(0)
        for _ in range(POWER_ITERATIONS):
            right = F.normalize(value.T @ (value @ right), dim=0)
    return (value @ right).square().sum() / value.numel()


@dataclass(frozen=True)
class WeightPenalty:
    """PEM-A to D: a penalty on every quantized weight.

    Attributes:
        penalty: Of one weight.
    """

    penalty: Penalty
    needs_layers: ClassVar[bool] = False

    def __call__(self, step: Step) -> Tensor:
        """The mean over the layers of the stage; zero for a stage without quantized weights."""
        penalties = [self.penalty(weight) for weight in _probe(step).weights]
        return torch.stack(penalties).mean() if penalties else step.output.new_zeros(())


@dataclass(frozen=True)
class NoisyInputs:
    """PEM-E: the error of the output when noise falls on the input of the stage.

    Attributes:
        error: The error of the reconstruction.
        noise: Deviation of the noise, as a share of that of each value over the batch.
    """

    error: OutputError
    noise: float = 0.2
    needs_layers: ClassVar[bool] = False

    def __call__(self, step: Step) -> Tensor:
        """The error against the float output on exact inputs."""
        probe = _probe(step)
        inputs = probe.inputs
        deviation = inputs.std(0, correction=0, keepdim=True) * self.noise
        noise = torch.randn(inputs.shape, generator=probe.generator).to(inputs.device)
        return self.error.between(probe.run(inputs + deviation * noise), step.target, step.channels)


@dataclass(frozen=True)
class SameForBothViews:
    """PCR-1: the output changes little when the image is perturbed.

    Attributes:
        error: The error of the reconstruction.
    """

    error: OutputError
    needs_layers: ClassVar[bool] = False

    def __call__(self, step: Step) -> Tensor:
        """The distance of the two outputs; of logits, the divergence of the predictions."""
        probe = _probe(step)
        if probe.last:
            ours, theirs = (x.log_softmax(-1) for x in (probe.view_output, step.output))
            return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return self.error.between(probe.view_output, step.output, step.channels)


@dataclass(frozen=True)
class SameForAllDrops:
    """PCR-2: the output changes little with the activations that pass unquantized.

    Attributes:
        error: The error of the reconstruction.
    """

    error: OutputError
    needs_layers: ClassVar[bool] = False

    def __call__(self, step: Step) -> Tensor:
        """The distance of two outputs for the same input."""
        probe = _probe(step)
        return self.error.between(probe.run(probe.inputs), step.output, step.channels)


@dataclass(frozen=True)
class RightForBothViews:
    """PCR-3: the output for the perturbed image is that of the float stage for the clean one.

    Attributes:
        error: The error of the reconstruction.
    """

    error: OutputError
    needs_layers: ClassVar[bool] = False

    def __call__(self, step: Step) -> Tensor:
        """The error of the perturbed view's output."""
        return self.error.between(_probe(step).view_output, step.target, step.channels)


PEM: Mapping[str, Callable[[OutputError], Term]] = {
    "A": lambda error: WeightPenalty(size),
    "A-relative": lambda error: WeightPenalty(relative_size),
    "B": lambda error: WeightPenalty(added_size),
    "C": lambda error: WeightPenalty(measured_gain),
    "D": lambda error: WeightPenalty(largest_gain),
    "E": NoisyInputs,
}
"""Forms of perturbation error mitigation, from the error of the reconstruction."""

PCR: Mapping[str, tuple[Callable[[OutputError], Term], ...]] = {
    "1": (SameForBothViews,),
    "2": (SameForAllDrops,),
    "3": (RightForBothViews,),
    "1+3": (RightForBothViews, SameForBothViews),
}
"""Forms of perturbation consistency reconstruction."""


def _probe(step: Step) -> Probe:
    if step.probe is None:
        raise ValueError("this term needs a step with a probe, as the engine makes them")
    return step.probe

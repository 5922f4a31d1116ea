"""LRQ-DiT: log-rotation quantization of diffusion transformers.

Yang et al., https://arxiv.org/abs/2508.03485. With D a diagonal and R a rotation,

    Y = Qa(X D R) Qw(W D^-1 R)^T

Weights W take twin logs (`qat.quantizers.TwinLog`), activations a scale for each token as it
arrives (`qat.quantizers.DynamicToken`); the recipe's quantizer factory chooses both. This
initialiser finds D and R for each linear layer and folds them into the weight:

    D   SmoothQuant's, from the largest weights and inputs of each channel
    R   a random-sign Hadamard matrix where the fluctuation J of X is below a threshold, otherwise
        the dual transformation (ARS, Eqs. 11-12)

What the paper is compared with, and its parts alone, are choices of `rotate`, `smooth` and of the
factory: nothing here knows their names.

Provenance: equations from secondary notes; the order of operations and the constants from the
authors' code (commit 84398f3), read, not copied. There J does not occur, layers are listed by hand.
*Reconstructed*: J of the raw input, before smoothing, over all calibration images and time steps.
Deviations: rotations are found on tokens of all calibration batches, not of the first; they are
saved with the checkpoint, which the released code never does; a size that the block of 128 does not
divide takes the largest divisor below.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat.calibrate import Batch, calibrate_in_order, joined, run, untouched_on_error
from qat.journal import Journal, NoJournal
from qat.layers import QuantLinear
from qat.quantizers import Phase, set_phase
from qat.transforms import Dual, Hadamard, Scaling, Transform, Transforms
from qat.transforms.rotation import Deal, Rule, block_size, dual_transformation, smoothing_scale

NUM_TOKENS = 512
"""Tokens of each layer's input that rotations are found on."""


@dataclass
class InputStatistics:
    """What a layer's input looks like in float.

    Attributes:
        fluctuation: J, its root mean square.
        largest: Largest magnitude of each channel.
        tokens: Some tokens, evenly drawn from all.
    """

    fluctuation: float
    largest: Float[Tensor, " channels"]
    tokens: Float[Tensor, "tokens channels"]


class Rotate(ABC):
    """Chooses the rotation of a layer's input; subclasses are frozen dataclasses."""

    @abstractmethod
    def __call__(self, statistics: InputStatistics, generator: torch.Generator) -> Transform:
        """The rotation.

        Args:
            statistics: Of the input; its tokens are smoothed already, its fluctuation is raw.
            generator: Draws signs and base rotations.
        """


@dataclass(frozen=True)
class HadamardRotation(Rotate):
    """A random-sign Hadamard matrix of the full width, as QuaRot has it."""

    def __call__(self, statistics: InputStatistics, generator: torch.Generator) -> Hadamard:
        """Draw the signs."""
        size = statistics.tokens.shape[1]
        signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
        return Hadamard(signs.to(statistics.tokens.device))


@dataclass(frozen=True)
class DualRotation(Rotate):
    """Greedy rotation, permutation, greedy rotation, as DuQuant has it.

    Attributes:
        largest_block: Channels of a group, at most.
        num_steps: Longest product of greedy steps.
        rule: `column` as the paper says, `row` as the released code does.
        deal: `stride` as in LRQ-DiT, `zigzag` as in DuQuant.
    """

    largest_block: int = 128
    num_steps: int = 256
    rule: Rule = "column"
    deal: Deal = "stride"

    def __call__(self, statistics: InputStatistics, generator: torch.Generator) -> Dual:
        """Search it on the tokens."""
        size = block_size(statistics.tokens.shape[1], self.largest_block)
        options = {"num_steps": self.num_steps, "rule": self.rule, "deal": self.deal}
        return Dual(*dual_transformation(statistics.tokens, size, generator, **options))


@dataclass(frozen=True)
class AdaptiveRotation(Rotate):
    """ARS: one rotation for mild outliers, another for salient ones.

    Attributes:
        threshold: Fluctuation from which on outliers are salient.
        mild: Rotation below the threshold.
        salient: Rotation from the threshold on.
    """

    threshold: float = 1.0
    mild: Rotate = field(default_factory=HadamardRotation)
    salient: Rotate = field(default_factory=DualRotation)

    def __call__(self, statistics: InputStatistics, generator: torch.Generator) -> Transform:
        """Decide by the fluctuation."""
        calm = statistics.fluctuation < self.threshold
        return (self.mild if calm else self.salient)(statistics, generator)


@dataclass(frozen=True)
class LRQDiT:
    """The initialiser: transform the inputs of linear layers, then calibrate every quantizer.

    Attributes:
        rotate: Chooses rotations; None rotates nothing.
        smooth: Whether channels are scaled first, as the authors' code always does. Where single
            channels are salient nothing else helps; elsewhere it changes little
            (docs/archive/log_2026-11.md).
    """

    rotate: Rotate | None = field(default_factory=AdaptiveRotation)
    smooth: bool = True

    def __call__(
        self, model: nn.Module, batches: Iterable[Batch], journal: Journal | None = None
    ) -> None:
        """Initialise a converted model; all batches count as one.

        Rotations are drawn from torch's global generator.

        Raises:
            ValueError: If a batch is not finite, or no linear layer has a quantized input.
        """
        batch = joined(batches)
        with untouched_on_error(model):
            set_phase(model, Phase.FLOAT)
            if self.rotate is not None or self.smooth:
                self._transform(model, batch, journal or NoJournal())
            calibrate_in_order(model, batch)
            set_phase(model, Phase.QUANTIZE)

    def _transform(self, model: nn.Module, batch: Batch, journal: Journal) -> None:
        seed = int(torch.randint(2**31, ()))
        generator = torch.Generator().manual_seed(seed)
        found = input_statistics(model, batch)
        chosen = []
        for name, (layer, statistics) in found.items():
            parts: list[Transform] = []
            if self.smooth:
                scaling = Scaling(smoothing_scale(layer.weight.detach(), statistics.largest))
                statistics.tokens = scaling(statistics.tokens)
                parts.append(scaling)
            if self.rotate is not None:
                parts.append(self.rotate(statistics, generator))
            layer.transform_(Transforms(*parts))
            kinds = " ".join(type(part).__name__.lower() for part in parts)
            chosen.append(
                {"layer": name, "fluctuation": statistics.fluctuation, "transform": kinds}
            )
        journal.note("transforms", chosen)


@torch.no_grad()
def input_statistics(
    model: nn.Module, batch: Batch
) -> dict[str, tuple[QuantLinear, InputStatistics]]:
    """Every linear layer with a quantized input, by name, and what it sees in the float model.

    Raises:
        ValueError: If there is none.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear) and module.input_quantizer is not None
    }
    if not layers:
        raise ValueError(
            "no linear layer has a quantized input, so there is nothing to rotate; give the plan "
            "an `input`, or use rotate: null and smooth: false"
        )
    found: dict[str, tuple[QuantLinear, InputStatistics]] = {}
    with _seen_by(layers, found):
        run(model, batch)
    return found


@contextmanager
def _seen_by(
    layers: dict[str, QuantLinear], found: dict[str, tuple[QuantLinear, InputStatistics]]
) -> Iterator[None]:
    """Within the block, every forward pass of a layer leaves the statistics of its input."""

    def look(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].detach().flatten(0, -2)
        every = max(1, len(tokens) // NUM_TOKENS)
        fluctuation = float(tokens.double().square().mean().sqrt())
        some = tokens[::every][:NUM_TOKENS].clone()
        found[name] = (layers[name], InputStatistics(fluctuation, tokens.abs().amax(0), some))

    handles = [
        layer.register_forward_pre_hook(partial(look, name)) for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

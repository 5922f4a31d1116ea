"""What the training steps of one stage are drawn from: batches, mixed inputs, outputs of layers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.quantizers import quantizers
from qat.spec import Operand
from qat.stages import Stage
from qat.terms import Step


@dataclass
class StageData:
    """All there is to draw training steps of one stage from."""

    quantized: Tensor
    exact: Tensor
    target: Tensor
    logits: Tensor
    rest: list[Stage]
    exact_inputs: float

    def draw(
        self,
        batch_size: int,
        generator: torch.Generator,
        stage: Stage,
        reference: Stage,
        taps: "Taps",
    ) -> Step:
        """Run a random batch through the stage, and its float twin if layers are asked for."""
        chosen = torch.randint(len(self.target), (batch_size,), generator=generator)
        chosen = chosen.to(self.target.device)
        taps.clear()
        inputs = self.quantized[chosen]
        if self.exact_inputs:
            exact = torch.rand(inputs.shape, generator=generator) < self.exact_inputs
            inputs = torch.where(exact.to(inputs.device), self.exact[chosen], inputs)
        output = stage.forward(inputs)
        if taps.pairs:
            with torch.no_grad():
                reference.forward(self.exact[chosen])
        return Step(output, self.target[chosen], self.logits[chosen], self._remainder, taps.read())

    def _remainder(self, output: Tensor) -> Tensor:
        for stage in self.rest:
            output = stage.forward(output)
        return output


class Taps:
    """Outputs of pairs of layers, quantized and float, of the latest forward passes."""

    def __init__(self, pairs: list[tuple[nn.Module, nn.Module]]) -> None:
        self.pairs = pairs
        self.seen: dict[nn.Module, Tensor] = {}

    def keep(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """A forward hook."""
        self.seen[layer] = output

    def clear(self) -> None:
        """Forget the last step."""
        self.seen.clear()

    def read(self) -> list[tuple[Tensor, Tensor]]:
        """The outputs of each pair."""
        return [(self.seen[ours], self.seen[theirs]) for ours, theirs in self.pairs]


@contextmanager
def tapped(pairs: list[tuple[nn.Module, nn.Module]]) -> Iterator[Taps]:
    """Keep the outputs of pairs of layers within the block."""
    taps = Taps(pairs)
    with ExitStack() as stack:
        for layer in (layer for pair in pairs for layer in pair):
            stack.callback(layer.register_forward_hook(taps.keep).remove)
        yield taps


@contextmanager
def dropped(stage: Stage, drop: float, generator: torch.Generator) -> Iterator[None]:
    """Let each activation value pass unquantized with probability `drop`."""

    def mix(quantizer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        # Drawn on the processor, from the stage's own generator, so that devices agree.
        passes = torch.rand(output.shape, generator=generator) < drop
        return torch.where(passes.to(output.device), inputs[0], output)

    with ExitStack() as stack:
        if drop:
            for module in stage.modules:
                for _, quantizer in quantizers(module):
                    if quantizer.operand is not Operand.WEIGHT:
                        stack.callback(quantizer.register_forward_hook(mix).remove)
        yield


def linear_layers(stage: Stage) -> list[nn.Module]:
    """Linear layers of a stage, float or converted, in the order of its modules."""
    return [
        module
        for top in stage.modules
        for module in top.modules()
        if isinstance(getattr(module, "weight", None), Tensor) and hasattr(module, "in_features")
    ]

"""What the training steps of one stage are drawn from: batches, mixed inputs, outputs of layers."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.layers import quantized_weights, through
from qat.likelihood import log_likelihoods
from qat.quantizers import quantizers
from qat.reconstruct.stage import Stage
from qat.reconstruct.terms import Probe, QuantizedWeight, Step
from qat.spec import Operand

SHIFT_IMAGES = 32


@dataclass
class StageData:
    """All there is to draw training steps of one stage from.

    Attributes:
        quantized: Inputs of the stage from the quantized stages before it.
        view: The same of the perturbed images, if there are any.
        exact: Inputs from the float stages before it.
        target: Outputs of the float stage on these.
        logits: Logits of the float model.
        rest: Float stages that follow.
        exact_inputs: Probability that a value of an input is the exact one.
        weights: Quantized weights of the stage.
        importance: Of every token of the outputs, if a term asks; see `token_importance`.
    """

    quantized: Tensor
    view: Tensor | None
    exact: Tensor
    target: Tensor
    logits: Tensor
    rest: list[Stage]
    exact_inputs: float
    weights: list[QuantizedWeight]
    importance: Callable[[], Tensor | None]

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
        view = None if self.view is None else self.view[chosen]
        return Step(
            output,
            self.target[chosen],
            self.logits[chosen],
            self._remainder,
            taps.read(),
            lambda: None if (shares := self.importance()) is None else shares[chosen],
            Probe(stage.forward, inputs, view, self.weights, not self.rest, generator),
            stage.channels,
        )

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
        called = (pair for pair in self.pairs if all(layer in self.seen for layer in pair))
        return [(self.seen[ours], self.seen[theirs]) for ours, theirs in called]


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


@torch.no_grad()
def weights_of(stage: Stage, clean: Tensor, view: Tensor | None) -> list[QuantizedWeight]:
    """The quantized weights of a stage, and how much a perturbation moves what they multiply.

    Args:
        stage: The stage, before it is trained.
        clean: Its inputs.
        view: Its inputs when the images are perturbed.
    """
    layers = [top.get_submodule(n) for top in stage.modules for n, *_ in quantized_weights(top)]
    seen: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        seen[layer].append(through(layer.input_quantizer, inputs[0]))  # type: ignore[arg-type]

    if view is not None:
        with ExitStack() as stack:
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(keep).remove)
            for images in (clean, view):
                stage.forward(images[:SHIFT_IMAGES])
    return [
        QuantizedWeight(layer, layer.weight.detach().clone(), _shift(layer, *seen[layer]))  # type: ignore[operator]
        for layer in layers
    ]


def _shift(layer: nn.Module, *inputs: Tensor) -> Tensor | None:
    """Mean squared difference of two inputs of a layer in each channel."""
    if len(inputs) != 2:  # the stage does not call it, or there is but one view
        return None
    change = (inputs[1] - inputs[0]).square()
    channels = 1 if hasattr(layer, "kernel_size") else change.ndim - 1
    return change.mean([axis for axis in range(change.ndim) if axis != channels])


def token_importance(
    chain: list[Stage], images: Tensor, generator: torch.Generator, at_once: int
) -> list[Tensor | None]:
    """What share of the answers of a float model hangs on each token of each stage's output.

    The squared gradient, by the token, of the log-probability of a class that the model itself
    draws (one draw of the diagonal Fisher information), as a share of that of all tokens of the
    image. One forward and one backward pass for all stages.

    Args:
        chain: Float stages, without trainable parameters.
        images: All images.
        generator: Draws the classes, on the processor.
        at_once: Images of a pass; bounds the memory.

    Returns:
        For each stage `images x tokens`, of sum 1 for each image; None where the output has none.
    """
    found: list[list[Tensor]] = [[] for _ in chain]
    with torch.enable_grad():
        for part in images.split(at_once):
            outputs = [chain[0].forward(part).detach().requires_grad_()]
            for stage in chain[1:]:
                outputs.append(stage.forward(outputs[-1]))
            chosen = log_likelihoods(outputs[-1], "sampled", None, generator).sum()
            gradients = torch.autograd.grad(chosen, outputs)
            for stage, seen, gradient in zip(chain, found, gradients, strict=True):
                energy = gradient.square().sum(stage.channels)
                if energy.ndim > 1:
                    total = energy.flatten(1).sum(1).clamp(min=torch.finfo(energy.dtype).tiny)
                    seen.append(energy / total.view(-1, *[1] * (energy.ndim - 1)))
    return [torch.cat(seen) if seen else None for seen in found]


def linear_layers(stage: Stage) -> list[nn.Module]:
    """Linear layers of a stage, float or converted, in the order of its modules."""
    return [
        module
        for top in stage.modules
        for module in top.modules()
        if isinstance(getattr(module, "weight", None), Tensor) and hasattr(module, "in_features")
    ]

"""What the loss of a reconstruction is made of: the protocol, and the error of the output."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.layers import through


@dataclass
class QuantizedWeight:
    """The weight of a layer in training.

    Attributes:
        layer: The layer.
        start: Its latent weight when training of the stage began.
        shift: Mean squared change of its quantized input under the perturbation of the images,
            one value for each input channel; None without such a perturbation.
    """

    layer: nn.Module
    start: Tensor
    shift: Tensor | None

    @property
    def value(self) -> Tensor:
        """The quantized weight, with gradients."""
        return through(self.layer.weight_quantizer, self.layer.weight)  # type: ignore[arg-type]


@dataclass
class Probe:
    """What a loss may do with the stage beside reading its output; nothing is done unasked.

    Attributes:
        run: The quantized stage, with its random drops.
        inputs: Its inputs in this step.
        view: Its inputs when the same images are perturbed; None without a perturbation.
        weights: Its quantized weights.
        last: Whether its output are the logits.
        generator: For random numbers, on the processor.
    """

    run: Callable[[Tensor], Tensor]
    inputs: Tensor
    view: Tensor | None
    weights: list[QuantizedWeight]
    last: bool
    generator: torch.Generator

    @cached_property
    def view_output(self) -> Tensor:
        """Output of the quantized stage on perturbed images; computed once, however many ask.

        Raises:
            ValueError: If the reconstruction has no perturbation.
        """
        if self.view is None:
            raise ValueError(
                "a term of the loss compares views, but the reconstruction perturbs no images; "
                "set `perturb`"
            )
        return self.run(self.view)


@dataclass
class Step:
    """What a loss sees of one training step of one stage.

    Attributes:
        output: Output of the quantized stage.
        target: Output of the float stage on float inputs.
        logits: Logits of the float model on the same images.
        remainder: What follows the stage in the float model, up to the logits.
        layers: Of each linear layer in the stage, its output in the quantized and in the float
            stage; empty unless a term asks for it.
        importance: The share of each token of the output in what the float model's answers depend
            on, `images x tokens`; None where the output has no tokens.
        probe: Further runs of the quantized stage, and its weights.
        channels: The axis of the channels of output and target.
    """

    output: Tensor
    target: Tensor
    logits: Tensor
    remainder: Callable[[Tensor], Tensor]
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    importance: Callable[[], Tensor | None] = lambda: None
    probe: Probe | None = None
    channels: int = -1

    @cached_property
    def output_logits(self) -> Tensor:
        """Logits when the rest of the model is in float; computed once, however many ask."""
        return self.remainder(self.output)


@runtime_checkable
class Term(Protocol):
    """A term of the loss of a stage."""

    needs_layers: ClassVar[bool]
    """Whether it reads `Step.layers`, which costs a forward pass of the float stage."""

    def __call__(self, step: Step) -> Tensor:
        """The value, a scalar."""
        ...


@dataclass(frozen=True)
class OutputError:
    """Squared error of the stage's output.

    Attributes:
        scope: `tensor` divides it by the energy of all targets: large tokens decide. `token`
            compares normalized tokens, mean 0 and variance 1 over the channels, which is what the
            LayerNorm of the next stage reads: every token counts alike.
    """

    scope: Literal["tensor", "token"] = "token"
    needs_layers: ClassVar[bool] = False

    def __call__(self, step: Step) -> Tensor:
        """The mean over tokens and channels."""
        return self.between(step.output, step.target, step.channels)

    def between(self, output: Tensor, target: Tensor, channels: int) -> Tensor:
        """The error of any output, whose channels lie along an axis."""
        if self.scope == "token":
            return F.mse_loss(normalized(output, channels), normalized(target, channels))
        return F.mse_loss(output, target) / target.square().mean()


def normalized(x: Tensor, channels: int) -> Tensor:
    """Tokens of mean 0 and variance 1 over their channels, which come last."""
    x = x.movedim(channels, -1)
    return F.layer_norm(x, x.shape[-1:])

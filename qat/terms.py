"""What the loss of a reconstruction is made of: the protocol, and the error of the output."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor
from torch.nn import functional as F


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
    """

    output: Tensor
    target: Tensor
    logits: Tensor
    remainder: Callable[[Tensor], Tensor]
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @cached_property
    def output_logits(self) -> Tensor:
        """Logits when the rest of the model is in float; computed once, however many ask."""
        return self.remainder(self.output)


@runtime_checkable
class Term(Protocol):
    """A term of the loss of a stage."""

    @property
    def needs_layers(self) -> bool:
        """Whether it reads `Step.layers`, which costs a forward pass of the float stage."""
        ...

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
    needs_layers: bool = field(default=False, init=False)

    def __call__(self, step: Step) -> Tensor:
        """The mean over tokens and channels."""
        output, target = step.output, step.target
        if self.scope == "token":
            output, target = (F.layer_norm(x, x.shape[-1:]) for x in (output, target))
            return F.mse_loss(output, target)
        return F.mse_loss(output, target) / target.square().mean()

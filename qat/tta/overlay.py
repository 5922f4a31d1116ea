"""Adapted parameters laid over a frozen model, so that several streams can share it.

A method never writes into the model. It keeps its parameters as one flat vector; for the length of
a forward pass they stand in for the model's own, and gradients flow to the vector.
"""

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

_LOCKS: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()

Hooks = Callable[[nn.Module], AbstractContextManager[None]]
"""Puts hooks on a model for the length of a forward pass."""


def no_hooks(model: nn.Module) -> AbstractContextManager[None]:
    """Leaves the model as it is."""
    return nullcontext()


class Overlay:
    """Some parameters of a model as one flat vector.

    Args:
        model: The model; it is frozen: evaluation mode, no gradients to its own parameters.
        names: Names of the parameters that are adapted; none is legal.

    Raises:
        ValueError: If a parameter is not in floating point, or does not exist.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.lock = _LOCKS.setdefault(model, threading.RLock())
        found = dict(model.named_parameters())
        self.names = tuple(names)
        if missing := [name for name in self.names if name not in found]:
            raise ValueError(f"the model has no parameter '{missing[0]}' to adapt")
        self.shapes = [found[name].shape for name in self.names]
        self.like = next(iter(found.values()))

    def __len__(self) -> int:
        """Number of adapted values."""
        return sum(shape.numel() for shape in self.shapes)

    def flat(self) -> Float[Tensor, " p"]:
        """A copy of the model's own values."""
        found = dict(self.model.named_parameters())
        values = [found[name].detach().flatten() for name in self.names]
        return torch.cat(values) if values else self.like.new_zeros(0)

    def named(self, flat: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """Views of a vector, by parameter."""
        parts = flat.split([shape.numel() for shape in self.shapes])
        return {
            name: part.view(shape)
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }

    def __call__(
        self, flat: Float[Tensor, " p"], images: Tensor, hooks: Hooks = no_hooks
    ) -> Float[Tensor, "n c"]:
        """Logits of the model with these values in place of its own.

        Streams in several threads take turns; the backward pass needs no turn.
        """
        with self.lock, hooks(self.model):
            return functional_call(self.model, self.named(flat), (images,)).float()

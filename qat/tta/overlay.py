"""Adapted parameters laid over a model, so that several streams can share it.

A method never writes into the model. It keeps its parameters as one flat vector; each forward pass
runs in a copy of the tree of modules, which holds views of that vector in the place of the model's
own parameters and shares everything else with the model. So streams in any number of threads need
no turns, and whoever uses the model meanwhile finds it as it is. Gradients flow to the vector.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Mappings of a module that a hook put on its copy goes into."""
AT_REST = {"training": False, "_compiled_call_impl": None}
"""What a copy has in its own way: evaluation mode, and no code compiled for the original."""
Hooks = Callable[[nn.Module], None]
"""Puts hooks on the copy in which a forward pass runs."""


def no_hooks(model: nn.Module) -> None:
    """Leaves the copy as it is."""


class Overlay:
    """Some parameters of a model as one flat vector.

    Args:
        model: The model; it is run in evaluation mode, without gradients to its own parameters.
        names: Names of the parameters that are adapted; none is legal.

    Raises:
        ValueError: If a parameter does not exist.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model
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
        values = [self.model.get_parameter(name).detach().flatten() for name in self.names]
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
        """Logits of the model with these values in place of its own."""
        values = self.named(flat)
        laid = {id(self.model.get_parameter(name)): value for name, value in values.items()}
        copy = copied(self.model, laid, {})
        hooks(copy)
        return copy(images).float()


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside one that `torch.compile` made, whose code would run that very module."""
    inside = module._modules.get("_orig_mod")
    return module if inside is None else inside


def copied(module: nn.Module, laid: Mapping[int, Tensor], seen: dict[int, nn.Module]) -> nn.Module:
    """A copy of a module and those within it, in evaluation mode; no tensor is copied.

    Args:
        module: The module.
        laid: Tensors that stand in for parameters, by their `id`. Other parameters are detached.
        seen: The copies made so far, by the `id` of what they are of.
    """
    module = uncompiled(module)
    if id(module) not in seen:
        seen[id(module)] = copy = object.__new__(type(module))
        content: dict[str, Any] = module.__dict__ | AT_REST
        forward = content.get("forward")
        if isinstance(forward, MethodType) and forward.__self__ is module:  # put on by a user
            content["forward"] = MethodType(forward.__func__, copy)
        for name in HOOKS:
            content[name] = content[name].copy()
        content["_parameters"] = {
            name: own if own is None else laid[id(own)] if id(own) in laid else own.detach()
            for name, own in module._parameters.items()
        }
        content["_modules"] = {
            name: child if child is None else copied(child, laid, seen)
            for name, child in module._modules.items()
        }
        copy.__dict__ = content
    return seen[id(module)]

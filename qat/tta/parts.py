"""States within states: `optimizer.first` is `first` of the part `optimizer`."""

import torch

from qat.tta.answer import State


def part(state: State, name: str) -> State:
    """The tensors of a part, under their names within it."""
    prefix = f"{name}."
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def with_part(state: State, name: str, tensors: State) -> State:
    """The state with a part replaced or added."""
    return {**state, **{f"{name}.{key}": value for key, value in tensors.items()}}


def at(device: torch.device, state: State) -> State:
    """The state with every tensor on a device."""
    return {name: value.to(device) for name, value in state.items()}

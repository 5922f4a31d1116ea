"""One stage of the chain that block reconstruction goes along."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """One stage of a chain.

    Attributes:
        name: Name of its main module.
        modules: The modules it runs.
        forward: From the output of the stage before, images for the first, to its own output.
        channels: The axis of the channels of its output; all others but the first are tokens.
    """

    name: str
    modules: tuple[nn.Module, ...]
    forward: Callable[[Tensor], Tensor]
    channels: int = -1

    def state(self) -> dict[str, Any]:
        """A copy of all that its modules keep."""
        return {
            f"{i}.{key}": value.clone() if isinstance(value, Tensor) else value
            for i, module in enumerate(self.modules)
            for key, value in module.state_dict().items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        for i, module in enumerate(self.modules):
            prefix = f"{i}."
            own = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
            module.load_state_dict(own)

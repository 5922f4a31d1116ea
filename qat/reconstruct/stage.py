"""One stage of the chain that block reconstruction goes along."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """One stage of a chain.

    Attributes:
        name: Name of its main module.
        modules: The modules it runs.
        forward: From the output of the stage before, images for the first, to its own output.
    """

    name: str
    modules: tuple[nn.Module, ...]
    forward: Callable[[Tensor], Tensor]

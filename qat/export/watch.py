"""What quantizers are given while a model runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qat.quantizers import Quantizer, quantizers


@contextmanager
def watched(
    model: nn.Module, wanted: Callable[[str, Quantizer], bool]
) -> Iterator[dict[str, Tensor]]:
    """Keep the inputs of quantizers within the block, in the order of their computation.

    Args:
        model: The model.
        wanted: Whether to keep that of a quantizer, by its name and itself.
    """
    inputs: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        return lambda module, args: inputs.__setitem__(name, args[0].detach())

    hooks = [
        quantizer.register_forward_pre_hook(keeper(name))
        for name, quantizer in quantizers(model)
        if wanted(name, quantizer)
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()

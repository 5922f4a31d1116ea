"""Peak memory of a piece of code, counted by its tensors and not asked of an allocator."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any, final

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@final
class Footprint(TorchDispatchMode):
    """Counts the bytes of the tensors that operations inside the context make, until they die.

    What an operation needs within itself is not seen, nor is what an allocator keeps.

    Attributes:
        peak: Most bytes that were alive at once.

    Example:
        >>> import torch
        >>> x = torch.zeros(256)
        >>> with Footprint() as footprint:
        ...     y = (x + 1) * 2 + 3
        >>> footprint.peak
        2048
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count what its results do not share with its arguments."""
        result = func(*args, **(kwargs or {}))
        given = args if not kwargs else (*args, *kwargs.values())
        known = {x.untyped_storage()._cdata for x in _tensors(given)}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                known.add(storage._cdata)
                self._alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self._alive)
        return result

    def _freed(self, size: int) -> None:
        self._alive -= size


def _tensors(values: Any) -> Iterator[Tensor]:
    """Tensors of nested lists; torch's own walk over a tree takes longer than most operations."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)

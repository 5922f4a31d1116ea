"""Modules that keep their class and their forward pass, which runs under a torch function mode.

A subclass is made at run time of the module's own class and of one of ours, which says what the
mode does. So names, parameters, attributes and `isinstance` stay as they are. What is added has
names that begin with `qat_`, so that a model has none of them.
"""

from abc import abstractmethod
from functools import cache
from typing import Any, ClassVar

from torch import nn
from torch.overrides import TorchFunctionMode


class Intercepted(nn.Module):
    """A module whose function calls pass through a mode; mixed into its class by `intercepted`.

    Attributes:
        qat_kind: The module's own class.
    """

    qat_kind: ClassVar[type[nn.Module]]

    @abstractmethod
    def qat_calls(self) -> TorchFunctionMode:
        """The mode of one forward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward pass, under the mode."""
        with self.qat_calls():
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def bare_(self) -> None:
        """Take the own class again; what was added stays as an idle part."""
        self.__class__ = self.qat_kind  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name both classes, since their subclass is made at run time."""
        return new, (type(self).__mro__[1], self.qat_kind), self.__dict__


@cache
def intercepted(mixin: type[Intercepted], kind: type[nn.Module]) -> type[nn.Module]:
    """The class of an intercepted module.

    Args:
        mixin: What intercepts.
        kind: The module's own class.
    """
    names = {"qat_kind": kind, "__doc__": kind.__doc__, "__module__": kind.__module__}
    return type(f"Quant{kind.__name__}", (mixin, kind), names)


def new(mixin: type[Intercepted], kind: type[nn.Module]) -> nn.Module:
    """An intercepted module without any content."""
    made = intercepted(mixin, kind)
    return made.__new__(made)

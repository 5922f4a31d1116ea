"""What only some jobs need: extras of ours, `pip install 'lowbit-vit[NAME]'`, and a compiler."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def needs(extra: str, job: str) -> Iterator[None]:
    """Import within the block what an extra brings.

    Args:
        extra: Its name in `pyproject.toml`.
        job: What it is for, an imperative.

    Raises:
        ValueError: If a package is missing, saying for what, which, and how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"cannot {job}: {error.name} is not installed; pip install 'lowbit-vit[{extra}]'"
        ) from None


def imported(module: str, extra: str, job: str) -> Any:
    """A module that an extra brings.

    Args:
        module: Its name.
        extra: The name of the extra in `pyproject.toml`.
        job: What it is for, an imperative.

    Raises:
        ValueError: If a package is missing.
    """
    with needs(extra, job):
        return import_module(module)


def require_compiler(switch: str) -> None:
    """Refuse `torch.compile` on a processor where no C++ compiler works, before any work is done.

    Args:
        switch: The setting that asks for it.

    Raises:
        ValueError: If none works.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError(
            f"{switch} needs a C++ compiler, and none works here; install g++ or clang++, name one "
            f"by the variable CXX, or set {switch} to false"
        ) from None

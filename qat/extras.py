"""Packages that only some jobs need: extras of ours, `pip install 'lowbit-vit[NAME]'`."""

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

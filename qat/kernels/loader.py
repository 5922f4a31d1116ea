"""The native library: whether it was built, and what this machine can run of it."""

import ctypes
import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from qat.kernels.blocks import Blocks
from qat.kernels.native import Native
from qat.kernels.products import Products
from qat.kernels.rows import Rows

HOW_TO_BUILD = (
    "where a C++17 compiler is present, run `make kernels` in a checkout, or else install the "
    "package again"
)
NAMES = ("amx", "avx512", "avx2", "neon", "portable")
_VARIABLE = "LOWBIT_KERNELS"
_HERE = Path(__file__).parent


@cache
def _library() -> ctypes.CDLL | None:
    """The library, if the package's build has made one; says so once if it has not."""
    for suffix in EXTENSION_SUFFIXES:
        path = _HERE / "src" / f"_native{suffix}"
        if path.exists():
            return ctypes.CDLL(str(path))
    logging.getLogger(__name__).warning(
        "the native kernels were not built, so packed models run by NumPy, slower; %s", HOW_TO_BUILD
    )
    return None


@cache
def instruction_sets() -> tuple[str, ...]:
    """What this build has and this machine can run, the fastest first; empty without a library."""
    library = _library()
    if library is None:
        return ()
    return tuple(
        name
        for name in NAMES
        if hasattr(library, f"{name}_binary_linear") and library.lowbit_supports(name.encode())
    )


def instruction_set() -> str:
    """The one in use, or `numpy`.

    Raises:
        ValueError: If the environment asks for one that is not there.
    """
    available = (*instruction_sets(), "numpy")
    chosen = os.environ.get(_VARIABLE) or available[0]
    if chosen not in available:
        raise ValueError(f"{_VARIABLE} is '{chosen}', this machine has {', '.join(available)}")
    return chosen


@cache
def native(name: str) -> Native:
    """The kernels of an instruction set that is there."""
    library = _library()
    assert library is not None
    return Native(library, name)


@cache
def operations_of(name: str) -> dict[str, Callable[..., Any]]:
    """Operations by the kernels of an instruction set that is there."""
    return {
        operation: getattr(part, operation)
        for part in (Rows(native(name)), Products(native(name)), Blocks(native(name)))
        for operation in vars(type(part))
        if not operation.startswith("_")
    }


def operations() -> dict[str, Callable[..., Any]]:
    """Operations by their names in the runtime's table; empty where NumPy is to do all of them.

    Raises:
        ValueError: If the environment asks for an instruction set that is not there.
    """
    name = instruction_set()
    return {} if name == "numpy" else operations_of(name)


def set_threads(count: int) -> None:
    """Threads of one operation, for the whole process; 1 at the start.

    Raises:
        ValueError: If there is to be none.
    """
    if count < 1:
        raise ValueError(f"an operation needs at least 1 thread, got {count}")
    library = _library()
    if library is not None:
        library.lowbit_set_threads(count)

"""Native kernels of the packed runtime: C++ without dependencies, called by ctypes.

One source is compiled for several instruction sets, and the best that the machine has is chosen
when it is first used. The environment variable `LOWBIT_KERNELS` forces another: `amx`, `avx512`,
`avx2`, `neon`, `portable`, or `numpy` for none. Integers do not depend on the choice. Work is done
by one thread unless `set_threads` says otherwise. Imports NumPy only.
"""

from qat.kernels.binary_block import BinaryBlock, BinaryLayer
from qat.kernels.bounds import bounds
from qat.kernels.loader import (
    HOW_TO_BUILD,
    instruction_set,
    instruction_sets,
    operations,
    set_threads,
)
from qat.kernels.plain_block import PlainBlock

__all__ = [
    "HOW_TO_BUILD",
    "BinaryBlock",
    "BinaryLayer",
    "PlainBlock",
    "bounds",
    "instruction_set",
    "instruction_sets",
    "operations",
    "set_threads",
]

"""The functions of one instruction set in the native library, by ctypes.

Bits: element i of a row is bit i % 64 of its word i // 64; 1 stands for +1, 0 for -1, and bits past
the last element are 0. `rows` are batch and tokens, flattened.
"""

import ctypes
from typing import Any

import numpy as np

from qat.kernels.arrays import address

_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_long, "f": ctypes.c_float}
_SIGNATURES = {
    "prepare_binary": "pnnp",
    "sign_pack": "pppnnnnp",
    "norm_sign_pack": "pppfpnnnnp",
    "layer_norm": "pppfnnp",
    "gelu": "pnp",
    "softmax": "pnnp",
    "rprelu": "ppppnnp",
    "shortcut": "pnnnp",
    "react": "ppppfppppnnnp",
    "binary_gemm": "ppnnnp",
    "binary_linear": "pppppnnnp",
    "binary_linear_bits": "ppppnnnp",
    "binary_attention": "ppffnnnnnp",
    "binary_attention_bits": "pppffnnnnp",
    "prepare_linear": "pnnp",
    "linear": "pppnnnp",
    "integer_linear": "ppppnnnp",
    "plain_block": "pnnnp",
    "binary_block": "pnnnp",
    "knapsack": "pppnnnppp",
    "popcount_limit": "np",
}
"""Arguments of each: an address, a length, a float."""


class Native:
    """The kernels of an instruction set.

    Args:
        library: The native library.
        name: The instruction set.
    """

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.name, self._library = name, library
        self._functions = {}
        for operation, signature in _SIGNATURES.items():
            function = getattr(library, f"{name}_{operation}")
            function.restype, function.argtypes = None, [_TYPES[letter] for letter in signature]
            self._functions[operation] = function

    def run(self, operation: str, *arguments: Any) -> None:
        """Run a kernel on arrays, None and numbers."""
        self._functions[operation](
            *[address(a) if isinstance(a, np.ndarray) else a for a in arguments]
        )

    def popcount_limit(self, rounds: int) -> int:
        """Run `rounds` of xor, popcount and add in registers; how many binary operations it was."""
        self.run("popcount_limit", rounds, np.arange(16, dtype=np.int32))
        per_round = ctypes.c_long.in_dll(self._library, f"{self.name}_popcount_operations")
        return rounds * per_round.value

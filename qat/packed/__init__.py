"""The packed file: format, bit packing, hash and bounds. NumPy and safetensors only, no torch."""

from qat.packed.bits import pack_codes, row_bytes, unpack_codes
from qat.packed.file import FORMAT, Packed, is_packed, read, size, write

__all__ = [
    "FORMAT",
    "Packed",
    "is_packed",
    "pack_codes",
    "read",
    "row_bytes",
    "size",
    "unpack_codes",
    "write",
]

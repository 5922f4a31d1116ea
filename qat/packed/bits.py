"""Integer codes of 1 to 16 bits as rows of bytes, and signs as 64-bit words.

Code i of a row takes the bits [i b, (i + 1) b) of the row, lowest bit first; bit j of a row is bit
j mod 8 of byte j // 8. A row begins on a byte of its own, its last byte is filled with zeros.
"""

import numpy as np


def row_bytes(num_codes: int, bits: int) -> int:
    """Bytes of one packed row.

    Example:
        >>> row_bytes(192, 1), row_bytes(3, 4)
        (24, 2)
    """
    return -(-num_codes * bits // 8)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned codes (rows, columns) into bytes (rows, row_bytes)."""
    rows, columns = codes.shape
    as_bits = np.unpackbits(
        codes.astype("<u2").view(np.uint8).reshape(rows, columns, 2), axis=2, bitorder="little"
    )
    return np.packbits(as_bits[:, :, :bits].reshape(rows, -1), axis=1, bitorder="little")


def unpack_codes(packed: np.ndarray, num_codes: int, bits: int) -> np.ndarray:
    """Codes (rows, num_codes) of packed rows, as uint16."""
    if bits == 8:
        return packed.astype(np.uint16)
    as_bits = np.unpackbits(packed, axis=1, count=num_codes * bits, bitorder="little")
    as_bits = as_bits.reshape(len(packed), num_codes, bits)
    codes = np.zeros((len(packed), num_codes), np.uint16)
    for bit in range(bits):
        codes |= as_bits[:, :, bit].astype(np.uint16) << bit
    return codes


def pack_signs(positive: np.ndarray) -> np.ndarray:
    """Booleans (..., k) as words (..., ceil(k / 64)): bit i mod 64 of word i // 64 is element i.

    True is +1, False is -1; bits past the last element are zero.
    """
    return words(np.packbits(positive, axis=-1, bitorder="little"))


def words(rows: np.ndarray) -> np.ndarray:
    """Rows of bytes (..., n), filled with zeros to whole words."""
    *outer, num_bytes = rows.shape
    filled = np.zeros((*outer, -(-num_bytes // 8) * 8), np.uint8)
    filled[..., :num_bytes] = rows
    return filled.view("<u8")

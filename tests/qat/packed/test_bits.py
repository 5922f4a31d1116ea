"""Codes and signs as bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.packed import pack_codes, row_bytes, unpack_codes
from qat.packed.bits import pack_signs, words


@given(
    bits=st.integers(1, 16),
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_packed_codes_come_back(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns))
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, row_bytes(columns, bits))
    assert (unpack_codes(packed, columns, bits) == codes).all()


def test_codes_take_the_lowest_bits_first() -> None:
    """What docs/packed_format.md promises to other programs."""
    assert pack_codes(np.array([[1, 2, 3]]), 4).tolist() == [[0x21, 0x03]]
    assert pack_codes(np.array([[1, 0, 0, 0, 0, 0, 0, 0, 1]]), 1).tolist() == [[1, 1]]


@pytest.mark.parametrize("k", [1, 63, 64, 65, 192])
def test_a_row_of_bits_in_the_file_is_a_row_of_words_in_memory(k: int) -> None:
    positive = np.random.default_rng(k).random((3, k)) > 0.5
    in_file = pack_codes(positive.astype(np.uint8), 1)
    in_memory = pack_signs(positive)
    assert in_memory.shape == (3, -(-k // 64))
    assert (words(in_file) == in_memory).all()
    assert int(in_memory[0, 0]) & 1 == positive[0, 0]

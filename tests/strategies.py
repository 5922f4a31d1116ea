"""Hypothesis strategies: specs, and tensors that hold many rounding ties."""

import math

import torch
from hypothesis import strategies as st

from qat import Granularity, QuantSpec

MAGNITUDES = (2.0**-10, 0.37, 1.0, 41.0)
"""Units of a tensor; the powers of two keep its ties exact."""


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], lowest: int = -512) -> torch.Tensor:
    """Finite tensors of 64ths of a unit, `lowest` to 512 of them; zeros and duplicates are common.

    Args:
        draw: Given by hypothesis.
        shape: Shape of the tensor.
        lowest: Smallest number of 64ths; 0 for operands that are never negative.
    """
    size = math.prod(shape)
    values = draw(st.lists(st.integers(lowest, 512), min_size=size, max_size=size))
    return torch.tensor(values).reshape(shape) / 64 * draw(st.sampled_from(MAGNITUDES))


def specs(min_bits: int = 1) -> st.SearchStrategy[QuantSpec]:
    """Every spec of at least `min_bits` bits."""
    return st.builds(
        QuantSpec,
        bits=st.integers(min_bits, 16),
        signed=st.booleans(),
        granularity=st.sampled_from(Granularity),
    )

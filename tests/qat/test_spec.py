"""Specs: which grids exist, their bounds, and the shape of their scales."""

from dataclasses import FrozenInstanceError

import pytest

from qat import Granularity, QuantSpec


@pytest.mark.parametrize("bits", [-1, 0, 17, 99])
def test_width_outside_1_to_16_is_refused_with_the_way_to_keep_float(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits must be 1 to 16, got {bits}; .*leave its spec"):
        QuantSpec(bits)


@pytest.mark.parametrize(
    ("bits", "signed", "bounds"),
    [
        (2, True, (-2, 1)),
        (2, False, (0, 3)),
        (4, True, (-8, 7)),
        (8, True, (-128, 127)),
        (8, False, (0, 255)),
        (16, True, (-32768, 32767)),
        (16, False, (0, 65535)),
    ],
)
def test_signed_grid_is_twos_complement_and_unsigned_starts_at_zero(
    bits: int, signed: bool, bounds: tuple[int, int]
) -> None:
    spec = QuantSpec(bits, signed)
    assert (spec.qmin, spec.qmax) == bounds


@pytest.mark.parametrize("bound", ["qmin", "qmax"])
@pytest.mark.parametrize("signed", [True, False])
def test_one_bit_has_no_integer_grid_and_says_what_to_use(bound: str, signed: bool) -> None:
    with pytest.raises(ValueError, match=r"1 bit has no integer grid.*BinaryQuantizers"):
        getattr(QuantSpec(1, signed), bound)


@pytest.mark.parametrize(
    ("granularity", "shape", "expected"),
    [
        (Granularity.PER_TENSOR, (64, 3, 2, 2), ()),
        (Granularity.PER_CHANNEL, (64, 3, 2, 2), (64, 1, 1, 1)),
        (Granularity.PER_CHANNEL, (10, 20), (10, 1)),
        (Granularity.PER_CHANNEL, (20,), (20,)),
        (Granularity.PER_CHANNEL, (4, 1, 16), (4, 1, 1)),
    ],
)
def test_scale_has_one_entry_per_index_of_the_first_trailing_axis(
    granularity: Granularity, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert QuantSpec(4, granularity=granularity).scale_shape(shape) == expected


def test_specs_are_equal_and_hash_by_content() -> None:
    assert {QuantSpec(4), QuantSpec(4, True), QuantSpec(4, False)} == {
        QuantSpec(4, True, Granularity.PER_TENSOR),
        QuantSpec(4, False, Granularity.PER_TENSOR),
    }


def test_spec_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(FrozenInstanceError):
        QuantSpec(4).bits = 99  # type: ignore[misc]

"""Arithmetic: values worked by hand, and gradients re-derived from LSQ's equation 3."""

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.testing import assert_close

from qat import ops
from tests.strategies import tensors

# x, x / 0.5, code on {-2 .. 1}: below, on and above both bounds, ties, and inside.
SIGNED = [
    (-9.0, -18.0, -2),
    (-1.25, -2.5, -2),
    (-1.0, -2.0, -2),
    (-0.75, -1.5, -2),
    (-0.7, -1.4, -1),
    (-0.25, -0.5, 0),
    (0.0, 0.0, 0),
    (0.25, 0.5, 0),
    (0.26, 0.52, 1),
    (0.5, 1.0, 1),
    (0.75, 1.5, 1),
    (9.0, 18.0, 1),
]
# x, x / 0.5 + 3, code on {0 .. 7}; ties of x / 0.5 round to even before 3 is added.
UNSIGNED = [
    (-9.0, -15.0, 0),
    (-1.75, -0.5, 0),
    (-1.5, 0.0, 0),
    (-1.25, 0.5, 1),
    (-0.75, 1.5, 1),
    (-0.25, 2.5, 3),
    (0.0, 3.0, 3),
    (0.3, 3.6, 4),
    (1.75, 6.5, 7),
    (2.0, 7.0, 7),
    (2.25, 7.5, 7),
    (9.0, 21.0, 7),
]
SCALE = torch.tensor(0.5)
GRIDS = pytest.mark.parametrize(
    ("table", "zero_point", "qmin", "qmax"),
    [(SIGNED, None, -2, 1), (UNSIGNED, torch.tensor(3.0), 0, 7)],
    ids=["signed", "unsigned"],
)
Table = list[tuple[float, float, int]]


def _column(table: Table, index: int) -> Tensor:
    return torch.tensor([float(row[index]) for row in table])


@GRIDS
def test_codes_are_the_clipped_half_to_even_roundings(
    table: Table, zero_point: Tensor | None, qmin: int, qmax: int
) -> None:
    x = _column(table, 0)
    assert torch.equal(ops.quantize(x, SCALE, zero_point, qmin, qmax), _column(table, 2))


@GRIDS
@pytest.mark.parametrize("grad", [False, True], ids=["without gradient", "with gradient"])
def test_fake_quantize_maps_codes_back_to_real_values(
    table: Table, zero_point: Tensor | None, qmin: int, qmax: int, grad: bool
) -> None:
    codes = _column(table, 2)
    expected = codes * 0.5 if zero_point is None else (codes - 3) * 0.5
    assert torch.equal(ops.dequantize(codes, SCALE, zero_point), expected)
    x = _column(table, 0).requires_grad_(grad)
    assert torch.equal(ops.fake_quantize(x, SCALE, zero_point, qmin, qmax), expected)


@GRIDS
@pytest.mark.parametrize("grad", [False, True], ids=["without gradient", "with gradient"])
def test_input_is_not_modified_by_the_in_place_arithmetic(
    table: Table, zero_point: Tensor | None, qmin: int, qmax: int, grad: bool
) -> None:
    x = _column(table, 0).requires_grad_(grad)
    codes = ops.quantize(x, SCALE, zero_point, qmin, qmax)
    ops.dequantize(codes, SCALE, zero_point)
    ops.fake_quantize(x, SCALE, zero_point, qmin, qmax)
    assert torch.equal(x, _column(table, 0))
    assert torch.equal(codes, _column(table, 2))
    assert zero_point is None or zero_point == 3


def test_division_by_the_scale_is_a_true_one() -> None:
    # x is exactly 1.5 s: a tie, code 2. Times the rounded 1 / s it falls below the tie for some s.
    scale = np.arange(1, 4000, dtype=np.float32) / np.float32(1000)
    x = scale * np.float32(1.5)
    flips = (x == scale * np.float64(1.5)) & (x * (1 / scale) < 1.5)
    assert flips.any()
    codes = ops.quantize(torch.from_numpy(x[flips]), torch.from_numpy(scale[flips]), None, -8, 7)
    assert (codes == 2).all()


@GRIDS
def test_gradient_passes_inside_the_grid_and_is_zero_on_and_beyond_its_bounds(
    table: Table, zero_point: Tensor | None, qmin: int, qmax: int
) -> None:
    x = _column(table, 0).requires_grad_()
    upstream = torch.arange(1.0, len(table) + 1)
    ops.fake_quantize(x, SCALE, zero_point, qmin, qmax).backward(upstream)
    inside = [float(qmin < v < qmax) for _, v, _ in table]
    assert torch.equal(x.grad, upstream * torch.tensor(inside))


def test_backward_pass_of_a_fixed_scale_needs_one_byte_a_value() -> None:
    sizes: list[int] = []
    x = torch.linspace(-2, 2, 64, requires_grad=True)

    def keep(saved: Tensor) -> Tensor:
        sizes.append(saved.nbytes)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        ops.fake_quantize(x, SCALE, torch.tensor(3.0), 0, 7)
    assert sizes == [64]


@GRIDS
@pytest.mark.parametrize("factor", [1.0, 0.125])
def test_scale_gradient_is_the_code_outside_and_the_rounding_residue_inside(
    table: Table, zero_point: Tensor | None, qmin: int, qmax: int, factor: float
) -> None:
    # d/ds (c - z) s with c = round(x / s + z) and a straight-through round: c - z outside the
    # grid, where c is constant, and c - z - x / s = c - v inside it.
    scale = SCALE.clone().requires_grad_()
    upstream = torch.linspace(-1, 2, len(table))
    out = ops.fake_quantize(_column(table, 0), scale, zero_point, qmin, qmax, factor)
    out.backward(upstream)
    zero = 0 if zero_point is None else 3
    each = [code - v if qmin < v < qmax else code - zero for _, v, code in table]
    expected = factor * sum(g * d for g, d in zip(upstream.tolist(), each, strict=True))
    assert_close(scale.grad, torch.tensor(expected))


def test_each_scale_receives_the_gradient_of_its_own_channel_only() -> None:
    x = torch.tensor([[0.3, 9.0], [-0.6, -9.0]])
    scale = torch.tensor([[0.5], [0.25]], requires_grad=True)
    ops.fake_quantize(x, scale, None, -2, 1).sum().backward()
    # Row 0: v = 0.6, 18 -> (1 - 0.6) + 1. Row 1: v = -2.4, -36 -> -2 - 2.
    assert_close(scale.grad, torch.tensor([[1.4], [-4.0]]))


def test_scale_without_gradient_leaves_the_gradient_of_the_input_alone() -> None:
    grads = []
    for trained in (True, False):
        x = _column(SIGNED, 0).requires_grad_()
        scale = SCALE.clone().requires_grad_(trained)
        ops.fake_quantize(x, scale, None, -2, 1).sum().backward()
        assert (scale.grad is not None) == trained
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("qmin", "qmax", "dtype"),
    [
        (-128, 127, torch.int8),
        (0, 127, torch.int8),
        (0, 128, torch.uint8),
        (0, 255, torch.uint8),
        (-129, 127, torch.int16),
        (0, 256, torch.int16),
        (-32768, 32767, torch.int16),
        (0, 65535, torch.int32),
    ],
)
def test_code_dtype_is_the_smallest_that_holds_both_bounds(
    qmin: int, qmax: int, dtype: torch.dtype
) -> None:
    assert ops.code_dtype(qmin, qmax) is dtype


def test_boundary_distance_is_half_on_a_code_and_zero_on_a_tie() -> None:
    v = torch.tensor([-2.0, -1.5, -1.25, 0.0, 0.5, 1.75, 2.5, 3.0])
    expected = torch.tensor([0.5, 0.0, 0.25, 0.5, 0.0, 0.25, 0.0, 0.5])
    assert torch.equal(ops.boundary_distance(v), expected)


@given(tensors((8,)))
def test_moving_less_than_the_boundary_distance_never_changes_a_code(x: Tensor) -> None:
    v = x.double()
    reach = ops.boundary_distance(v) * 0.999
    for moved in (v - reach, v + reach):
        assert torch.equal(moved.round(), v.round())

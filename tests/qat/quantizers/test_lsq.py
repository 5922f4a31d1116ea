"""LSQ: its start, its forward values, and its gradient against the paper's closed form."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from qat import Granularity, Operand, QuantSpec
from qat.quantizers import LSQ, MinMax

# Below, on, inside and above both clip bounds of a 3-bit grid of step 0.5, with ties.
V = [-9.0, -2.0, -1.9, -1.75, -0.75, -0.25, 0.0, 0.25, 0.3, 0.75, 1.25, 1.5, 1.6, 9.0]
PER_CHANNEL = Granularity.PER_CHANNEL


def _lsq(spec: QuantSpec, scale: float, shape: tuple[int, ...] = (len(V),)) -> LSQ:
    quantizer = LSQ(spec, shape)
    with torch.no_grad():
        quantizer.scale.fill_(scale)
    return quantizer


def _eq1_2(v: float, s: float, q_n: int, q_p: int) -> float:
    return round(min(max(v / s, -q_n), q_p)) * s  # Python rounds half to even, as we do


def _eq3(v: float, s: float, q_n: int, q_p: int) -> float:
    if v / s <= -q_n:
        return -q_n
    return q_p if v / s >= q_p else -v / s + round(v / s)


GRIDS = pytest.mark.parametrize(("signed", "q_n", "q_p"), [(True, 4, 3), (False, 0, 7)])


@GRIDS
def test_lsq_output_equals_eq1_and_eq2(signed: bool, q_n: int, q_p: int) -> None:
    found = _lsq(QuantSpec(3, signed), 0.5).fake_quantize(torch.tensor(V))
    assert torch.equal(found, torch.tensor([_eq1_2(v, 0.5, q_n, q_p) for v in V]))


@GRIDS
def test_lsq_step_gradient_equals_eq3(signed: bool, q_n: int, q_p: int) -> None:
    quantizer = _lsq(QuantSpec(3, signed), 0.5)
    upstream = torch.linspace(-1, 2, len(V))
    quantizer.fake_quantize(torch.tensor(V)).backward(upstream)
    g = 1 / math.sqrt(len(V) * q_p)
    expected = g * sum(
        u * _eq3(v, 0.5, q_n, q_p) for u, v in zip(upstream.tolist(), V, strict=True)
    )
    assert_close(quantizer.scale.grad, torch.tensor(expected))


@GRIDS
def test_lsq_data_gradient_is_one_strictly_inside_the_grid(
    signed: bool, q_n: int, q_p: int
) -> None:
    v = torch.tensor(V, requires_grad=True)
    _lsq(QuantSpec(3, signed), 0.5).fake_quantize(v).sum().backward()
    assert torch.equal(v.grad, torch.tensor([float(-q_n < x / 0.5 < q_p) for x in V]))


@pytest.mark.parametrize(
    ("shape", "granularity", "values_per_scale"),
    [
        ((8, 3), Granularity.PER_TENSOR, 24),
        ((8, 3), PER_CHANNEL, 3),
        ((8, 3, 2, 2), PER_CHANNEL, 12),
        ((6,), Granularity.PER_TENSOR, 6),
        ((6,), PER_CHANNEL, 1),
    ],
)
def test_gradient_factor_counts_the_values_of_one_scale(
    shape: tuple[int, ...], granularity: Granularity, values_per_scale: int
) -> None:
    quantizer = LSQ(QuantSpec(4, granularity=granularity), shape)
    assert quantizer.grad_factor == pytest.approx(1 / math.sqrt(values_per_scale * 7))


def test_gradient_factor_of_an_activation_does_not_depend_on_the_batch() -> None:
    grads = []
    for repeats in (1, 5):
        quantizer = _lsq(QuantSpec(3), 0.5)
        quantizer.fake_quantize(torch.tensor(V).repeat(repeats, 1)).mean(0).sum().backward()
        grads.append(quantizer.scale.grad)
    assert_close(*grads)


def test_start_is_twice_the_mean_magnitude_over_root_q_p() -> None:
    quantizer = LSQ(QuantSpec(3), (2,))
    quantizer.observe(torch.tensor([[1.0, -3.0]]))  # mean magnitude 2
    quantizer.observe(torch.tensor([[0.5, -0.5], [0.5, 0.5]]))  # 0.5
    quantizer.freeze()
    assert_close(quantizer.scale.detach(), torch.tensor(2 * 1.25 / math.sqrt(3)))


def test_start_of_a_channel_uses_its_own_magnitude() -> None:
    quantizer = LSQ(QuantSpec(3, granularity=PER_CHANNEL), (2, 2))
    quantizer.observe(torch.tensor([[1.0, -3.0], [0.25, 0.75]]))
    quantizer.freeze()
    expected = torch.tensor([[2 * 2.0], [2 * 0.5]]) / math.sqrt(3)
    assert_close(quantizer.scale.detach(), expected)


def test_start_on_zeros_is_a_usable_step() -> None:
    quantizer = LSQ(QuantSpec(3), (2,))
    quantizer.observe(torch.zeros(4, 2))
    quantizer.freeze()
    assert quantizer.scale == 1
    assert torch.equal(quantizer.fake_quantize(torch.zeros(2)), torch.zeros(2))


def test_unsigned_start_ignores_the_negative_part_of_the_range() -> None:
    quantizer = LSQ(QuantSpec(2, signed=False), (2,), observer=MinMax)
    quantizer.observe(torch.tensor([[-30.0, 6.0]]))
    quantizer.freeze()
    assert quantizer.scale == 2


def test_step_driven_through_zero_is_used_by_its_size_with_the_gradient_of_the_size() -> None:
    positive, negative = _lsq(QuantSpec(3), 0.5), _lsq(QuantSpec(3), -0.5)
    outputs = [quantizer.fake_quantize(torch.tensor(V)) for quantizer in (positive, negative)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.sum().backward()
    assert torch.equal(positive.scale.grad, -negative.scale.grad)
    assert negative.codes(torch.tensor(V)).scale == 0.5


@pytest.mark.parametrize("start", [0.3, 0.5])
def test_descent_on_the_error_finds_the_step_of_gridded_data(start: float) -> None:
    codes = torch.arange(-4.0, 4)
    quantizer = _lsq(QuantSpec(3), start, (8,))
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        (quantizer.fake_quantize(0.4 * codes) - 0.4 * codes).square().sum().backward()
        optimizer.step()
    assert_close(quantizer.scale.detach(), torch.tensor(0.4), rtol=0, atol=0.01)


def test_boundary_distance_counts_steps_from_the_nearest_tie() -> None:
    x = torch.tensor([0.0, 0.25, 0.125, -0.5])
    expected = torch.tensor([0.5, 0.0, 0.25, 0.5])
    assert torch.equal(_lsq(QuantSpec(3), -0.5).boundary_distance(x), expected)


def test_freezing_without_data_is_refused_and_keeps_the_step() -> None:
    quantizer = _lsq(QuantSpec(3), 0.5)
    with pytest.raises(RuntimeError, match="no batch was observed"):
        quantizer.freeze()
    assert quantizer.scale == 0.5


def test_codes_carry_no_gradient() -> None:
    codes = _lsq(QuantSpec(3), 0.5).codes(torch.tensor(V, requires_grad=True))
    tensors: list[Tensor] = [codes.values, codes.scale]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_unsigned_weights_are_refused_because_there_is_no_zero_point() -> None:
    spec = QuantSpec(4, signed=False)
    with pytest.raises(ValueError, match=r"LSQ has no zero point.*Affine with learn_scale"):
        LSQ(spec, (4, 8), Operand.WEIGHT)
    LSQ(spec, (8,), Operand.INPUT)

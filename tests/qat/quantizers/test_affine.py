"""Affine quantization: scale and zero point from statistics, fixed afterwards."""

from functools import partial

import pytest
import torch
from hypothesis import given
from torch import Tensor

from qat import Granularity, QuantSpec
from qat.quantizers import Affine, Percentile
from tests.strategies import tensors


def _frozen(spec: QuantSpec, x: Tensor, shape: tuple[int, ...] = ()) -> Affine:
    quantizer = Affine(spec, shape)
    quantizer.observe(x)
    quantizer.freeze()
    return quantizer


def test_signed_grid_is_symmetric_without_zero_point() -> None:
    quantizer = _frozen(QuantSpec(2), torch.tensor([-1.0, 0.25]))  # scale max(1 / 2, 0.25 / 1)
    x = torch.tensor([-9.0, -1.0, -0.75, -0.7, -0.25, 0.25, 0.3, 0.5, 9.0])
    expected = torch.tensor([-1.0, -1.0, -1.0, -0.5, 0.0, 0.0, 0.5, 0.5, 0.5])
    assert quantizer.scale == 0.5
    assert torch.equal(quantizer.fake_quantize(x), expected)
    assert quantizer.codes(x).zero_point is None


def test_unsigned_grid_shifts_by_the_zero_point() -> None:
    quantizer = _frozen(QuantSpec(2, signed=False), torch.tensor([-0.5, 1.0]))  # s 0.5, z 1
    x = torch.tensor([-9.0, -0.5, -0.25, 0.0, 0.25, 0.3, 0.75, 1.0, 9.0])
    codes = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3])
    assert torch.equal(quantizer.codes(x).values.long(), codes)
    assert torch.equal(quantizer.fake_quantize(x), (codes - 1) * 0.5)


def test_each_channel_has_its_own_scale_and_zero_point() -> None:
    spec = QuantSpec(2, signed=False, granularity=Granularity.PER_CHANNEL)
    quantizer = _frozen(spec, torch.tensor([[-1.0, 0.0], [2.0, 6.0]]), (2,))
    assert torch.equal(quantizer.scale, torch.tensor([1.0, 2.0]))
    assert torch.equal(quantizer.zero_point, torch.tensor([1.0, 0.0]))


def test_gradient_passes_straight_through_inside_and_stops_outside() -> None:
    quantizer = _frozen(QuantSpec(2, signed=False), torch.tensor([-0.5, 1.0]))
    x = torch.tensor([-9.0, -0.5, -0.25, 0.3, 0.99, 1.0, 9.0], requires_grad=True)
    quantizer.fake_quantize(x).backward(torch.arange(1.0, 8))
    assert torch.equal(x.grad, torch.tensor([0.0, 0.0, 3.0, 4.0, 5.0, 0.0, 0.0]))


def test_nothing_of_it_is_trained_unless_asked_for() -> None:
    quantizer = Affine(QuantSpec(4), (3,))
    assert not any(parameter.requires_grad for parameter in quantizer.parameters())
    assert Affine(QuantSpec(4), (3,), learn_scale=True).scale.requires_grad
    assert set(quantizer.state_dict()) == {"scale", "zero_point", "_extra_state"}


@given(tensors((6,)))
def test_zero_is_kept_exactly_whatever_the_range(x: Tensor) -> None:
    for signed in (True, False):
        quantizer = _frozen(QuantSpec(3, signed), x)
        assert quantizer.fake_quantize(torch.zeros(1)) == 0


def test_observer_is_chosen_by_argument() -> None:
    x = torch.cat([torch.linspace(0, 1, 99), torch.tensor([100.0])])
    quantizer = Affine(QuantSpec(4, signed=False), (), observer=partial(Percentile, fraction=0.98))
    quantizer.observe(x)
    quantizer.freeze()
    assert quantizer.scale == 1 / 15


def test_freezing_without_data_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no batch was observed"):
        Affine(QuantSpec(4), ()).freeze()


def test_boundary_distance_counts_steps_from_the_nearest_tie() -> None:
    quantizer = _frozen(QuantSpec(2, signed=False), torch.tensor([-0.5, 1.0]))  # s 0.5, z 1
    x = torch.tensor([0.0, 0.25, 0.125, -0.5])
    assert torch.equal(quantizer.boundary_distance(x), torch.tensor([0.5, 0.0, 0.25, 0.5]))

"""Log and tangent quantizers: formulas, look-up form, gradients, search."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from qat import Granularity, Operand, Phase, QuantSpec
from qat.ops import look_up
from qat.quantizers import Companding, Log2, LogSqrt2, TanQ
from qat.quantizers.tanq import tangent_code, tangent_level

SHAPE = (3, 1, 1)


def _spec(bits: int = 4) -> QuantSpec:
    return QuantSpec(bits, signed=False)


def _frozen(quantizer: Companding, x: Tensor) -> Companding:
    quantizer.observe(x)
    quantizer.freeze()
    quantizer.forget()
    quantizer.phase = Phase.QUANTIZE
    return quantizer


def _attention(sharpness: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (sharpness * torch.randn(2, 3, 40, 40, generator=generator)).softmax(-1)


@pytest.mark.parametrize(
    ("zero", "codes", "values"),
    [
        ("none", [0, 0, 1, 2, 3, 3, 3, 3], [1, 1, 2**-0.5, 0.5, *[2**-1.5] * 4]),
        ("extra", [0, 0, 1, 2, 3, 4, 4, 4], [1, 1, 2**-0.5, 0.5, 2**-1.5, 0, 0, 0]),
        ("last", [0, 0, 1, 2, 3, 3, 3, 3], [1, 1, 2**-0.5, 0.5, 0, 0, 0, 0]),
    ],
)  # fmt: skip
def test_log_sqrt2_codes_and_values(zero: str, codes: list[int], values: list[float]) -> None:
    quantizer = LogSqrt2(_spec(2), SHAPE, zero=zero)
    x = torch.tensor([3.0, 0.95, 0.7, 0.49, 0.36, 0.25, 1e-6, 0.0])
    assert quantizer.codes(x).values.tolist() == codes
    assert_close(quantizer.fake_quantize(x), torch.tensor(values))


def test_log2_is_log_sqrt2_with_every_second_power() -> None:
    quantizer = Log2(_spec(2), SHAPE, zero="extra")
    assert quantizer.levels().tolist() == [1.0, 0.5, 0.25, 0.125, 0.0]
    assert quantizer.codes(torch.tensor([0.71, 0.70, 0.0])).values.tolist() == [0, 1, 4]


@given(code=st.integers(0, 63), scale=st.floats(0.01, 4))
def test_odd_codes_are_a_power_of_two_times_a_constant(code: int, scale: float) -> None:
    """The identity of RepQ-ViT by which base sqrt 2 runs on a base 2 kernel."""
    shifted = scale * (1 + (code % 2) * (math.sqrt(2) - 1)) * 2.0 ** math.floor(-code / 2)
    assert shifted == pytest.approx(scale * 2 ** (-code / 2), rel=1e-12)


def test_log_scale_is_the_quantile_of_least_squared_error() -> None:
    attention = _attention()
    quantizer = _frozen(LogSqrt2(_spec(3), SHAPE), attention)
    errors = {}
    for p in (0.999, 0.9999, 0.99999):
        other = LogSqrt2(_spec(3), SHAPE)
        with torch.no_grad():
            other.scale.copy_(torch.quantile(attention, p))
        errors[other.scale.item()] = (other.fake_quantize(attention) - attention).square().sum()
    assert quantizer.scale.item() == pytest.approx(min(errors, key=errors.get), rel=1e-5)


def test_tangent_by_hand() -> None:
    """alpha = pi / 2, beta = 1/2: T runs from -1 to 1, so the middle of 3 codes is 0."""
    steepness, centre = torch.tensor(math.pi / 2), torch.tensor(0.5)
    u = torch.tensor([0.0, 0.5, 1.0, 0.25])
    codes = tangent_code(u, steepness, centre, 3)
    assert_close(codes, torch.tensor([0.0, 1.0, 2.0, 1 - math.tan(math.pi / 8)]))
    levels = tangent_level(torch.tensor([0.0, 0.5, 2.0]), steepness, centre, 3)
    assert_close(levels, torch.tensor([0.0, 0.5 - math.atan(0.5) * 2 / math.pi, 1.0]))


def test_tangent_levels_of_the_notes() -> None:
    """Form T2, 4 bits, alpha = 0.9 pi: fine at both ends."""
    levels = tangent_level(torch.arange(16.0), torch.tensor(0.9 * math.pi), torch.tensor(0.5), 16)
    expected = [0, 0.0084, 0.0197, 0.0357, 0.0602, 0.1013, 0.1813, 0.3591, 0.6409, 0.8187, 0.8987]
    assert_close(levels[:11], torch.tensor(expected), atol=6e-5, rtol=0)


@given(st.floats(0.1, 0.95), st.floats(0.3, 0.8), st.integers(2, 8))
def test_tangent_levels_ascend_from_0_to_1_and_have_their_own_codes(
    share: float, centre: float, bits: int
) -> None:
    limit = math.pi / 2 / max(centre, 1 - centre)
    steepness, middle = torch.tensor(share * limit), torch.tensor(centre)
    codes = torch.arange(2.0**bits)
    levels = tangent_level(codes, steepness, middle, 2**bits)
    assert levels[0] == pytest.approx(0, abs=1e-6) and levels[-1] == pytest.approx(1, abs=1e-6)
    assert (levels.diff() > 0).all()
    assert torch.equal(tangent_code(levels, steepness, middle, 2**bits).round(), codes)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_tanq_search_beats_its_own_fixed_forms_and_log_on_peaky_attention(bits: int) -> None:
    attention = _attention()
    errors = {}
    for name, quantizer in {
        "t1": TanQ(_spec(bits), SHAPE),
        "t2": TanQ(_spec(bits), SHAPE, form="t2"),
        "log": LogSqrt2(_spec(bits), SHAPE, zero="last"),
    }.items():
        _frozen(quantizer, attention)
        errors[name] = (quantizer(attention) - attention).square().sum().item()
    assert errors["t1"] <= errors["t2"] * 1.001
    assert errors["t1"] < errors["log"]


def test_histogram_of_several_batches_is_that_of_one() -> None:
    attention = _attention()
    once, twice = TanQ(_spec(), SHAPE), TanQ(_spec(), SHAPE)
    _frozen(once, attention)
    twice.observe(attention[:1])
    _frozen(twice, attention[1:])
    for name in ("scale", "steepness", "centre"):
        assert_close(once.state_dict()[name], twice.state_dict()[name])


@pytest.mark.parametrize("factory", [Log2, LogSqrt2, TanQ])
def test_look_up_equals_fake_quantize_exactly(factory: Any) -> None:
    attention = _attention(6.0)
    quantizer = _frozen(factory(_spec(), SHAPE), attention)
    codes = quantizer.codes(attention)
    assert codes.values.dtype in (torch.uint8, torch.int8)
    assert codes.table is not None
    assert codes.table.shape == (quantizer.num_codes,)
    assert torch.equal(look_up(codes.values, codes.table), quantizer(attention))


@pytest.mark.parametrize("factory", [LogSqrt2, TanQ])
def test_gradients_are_straight_through_inside_and_lsq_for_the_scale(factory: Any) -> None:
    quantizer = factory(_spec(3), SHAPE, learn_scale=True)
    with torch.no_grad():
        quantizer.scale.fill_(0.5)
    x = torch.tensor([0.03, 0.2, 0.49, 0.7], requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    output = quantizer.fake_quantize(x)
    (output * weight).sum().backward()
    assert torch.equal(x.grad, torch.tensor([1.0, 2.0, 3.0, 0.0]))
    per_value = output.detach() / 0.5 - torch.tensor([0.06, 0.4, 0.98, 0.0])
    expected = (weight * per_value).sum() * quantizer.grad_factor
    assert_close(quantizer.scale.grad, expected)


@pytest.mark.parametrize("factory", [LogSqrt2, TanQ])
@pytest.mark.parametrize(
    "spec", [QuantSpec(4), QuantSpec(4, False, Granularity.PER_CHANNEL)], ids=str
)
def test_grids_it_does_not_have_are_refused(factory: Any, spec: QuantSpec) -> None:
    with pytest.raises(ValueError, match=r"\[0, scale\] with one scale"):
        factory(spec, SHAPE, Operand.ATTENTION)


def test_misspelt_form_is_refused() -> None:
    with pytest.raises(ValueError, match="'t1' or 't2'"):
        TanQ(_spec(), SHAPE, form="t3")
    with pytest.raises(ValueError, match="none, extra, last"):
        LogSqrt2(_spec(), SHAPE, zero="some")


@pytest.mark.parametrize("factory", [LogSqrt2, TanQ])
def test_freezing_without_data_is_refused(factory: Any) -> None:
    with pytest.raises(RuntimeError, match="no batch was observed"):
        factory(_spec(), SHAPE).freeze()


@pytest.mark.parametrize("factory", [LogSqrt2, TanQ])
def test_attention_of_zeros_only_is_handled(factory: Any) -> None:
    quantizer = _frozen(factory(_spec(), SHAPE), torch.zeros(1, 3, 4, 4))
    assert torch.equal(quantizer(torch.zeros(2, 2)), torch.zeros(2, 2))

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import qat
from binaryvit import BinaryQuantizers
from binaryvit.asm import DynamicShift, ScaledShift, ShiftFactory, StandardizedShift, StaticShift
from binaryvit.quantizers import BinaryActivation, BinaryAttentionMap, BinaryWeight
from qat import Operand, Phase, Quantizer, QuantSpec
from qat.quantizers import LSQ, Affine

ONE_BIT = QuantSpec(1)
SHIFTS: dict[str, ShiftFactory] = {
    "static": StaticShift,
    "dynamic": partial(DynamicShift, gain=0.7),
    "scaled": ScaledShift,
    "standardized": StandardizedShift,
}
QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "weight": lambda: BinaryWeight(ONE_BIT, (6, 4)),
    "uncentred": lambda: BinaryWeight(ONE_BIT, (6, 4), centre=False),
    "attention": lambda: BinaryAttentionMap(ONE_BIT, (1, 1, 1)),
} | {name: partial(BinaryActivation, ONE_BIT, (4,), shift=shift) for name, shift in SHIFTS.items()}
every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
every_shift = pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)


def operand_for(name: str, seed: int) -> Tensor:
    """Random values with exact zeros among them, in a shape that suits the quantizer."""
    generator = torch.Generator().manual_seed(seed)
    shape = {"weight": (6, 4), "uncentred": (6, 4), "attention": (2, 3, 5, 5)}.get(name, (3, 5, 4))
    x = torch.randn(shape, generator=generator)
    x.view(-1)[::3] = 0
    return x.softmax(-1) if name == "attention" else x


def calibrated(quantizer: Quantizer, *batches: Tensor) -> Quantizer:
    """The quantizer after observing batches, in phase QUANTIZE."""
    with qat.observing(quantizer):
        for batch in batches:
            quantizer(batch)
    return quantizer


def quantize_now(quantizer: Quantizer) -> Quantizer:
    """The quantizer in phase QUANTIZE with its state as it is."""
    quantizer.phase = Phase.QUANTIZE
    return quantizer


def attention_map(scale: float) -> BinaryAttentionMap:
    """An attention quantizer in phase QUANTIZE with a given s."""
    quantizer = BinaryAttentionMap(ONE_BIT, (1, 1, 1))
    quantizer.scale.data.fill_(scale)
    quantizer.phase = Phase.QUANTIZE
    return quantizer


def tensors_of(quantizer: Quantizer) -> dict[str, Tensor]:
    """Every parameter and buffer, persistent or not."""
    return dict(quantizer.named_parameters()) | dict(quantizer.named_buffers())


# Properties that every binary quantizer has.


@every_quantizer
@given(seed=st.integers(0, 10_000))
def test_dequantized_codes_equal_fake_quantization_bit_for_bit(name: str, seed: int) -> None:
    quantizer = QUANTIZERS[name]().eval()
    calibrated(quantizer, operand_for(name, seed + 1))
    for parameter in quantizer.parameters():
        parameter.data.mul_(1.1).add_(0.01)
    x = operand_for(name, seed)
    assert torch.equal(quantizer.dequantize(quantizer.codes(x)), quantizer.fake_quantize(x))


@every_quantizer
@given(seed=st.integers(0, 10_000))
def test_codes_have_two_values(name: str, seed: int) -> None:
    quantizer = calibrated(QUANTIZERS[name]().eval(), operand_for(name, seed + 1))
    codes = quantizer.codes(operand_for(name, seed)).values
    assert set(codes.unique().tolist()) == ({0, 1} if name == "attention" else {-1, 1})
    assert not codes.is_floating_point()


@every_quantizer
def test_reading_codes_changes_no_state(name: str) -> None:
    quantizer = calibrated(QUANTIZERS[name](), operand_for(name, 0)).train()
    before = {key: value.clone() for key, value in tensors_of(quantizer).items()}
    quantizer.codes(operand_for(name, 1) + 1)
    for key, value in tensors_of(quantizer).items():
        assert torch.equal(value, before[key]), key


@every_quantizer
def test_float_phase_returns_the_operand_itself(name: str) -> None:
    x = operand_for(name, 0)
    assert QUANTIZERS[name]()(x) is x


@every_quantizer
def test_half_precision_operands_are_binarized_in_float32_and_come_back(name: str) -> None:
    quantizer = calibrated(QUANTIZERS[name]().eval(), operand_for(name, 0))
    x = operand_for(name, 1).bfloat16()
    assert torch.equal(quantizer(x), quantizer(x.float()).bfloat16())


@every_quantizer
def test_state_comes_back_bit_for_bit_from_a_state_dict(name: str) -> None:
    quantizer = calibrated(QUANTIZERS[name]().eval(), operand_for(name, 0), operand_for(name, 1))
    restored = QUANTIZERS[name]().eval()
    restored.load_state_dict(quantizer.state_dict())
    x = operand_for(name, 2)
    assert restored.phase is Phase.QUANTIZE
    assert torch.equal(restored(x), quantizer(x))


@pytest.mark.parametrize("name", ["scaled", "standardized", "attention"])
def test_calibrating_again_replaces_the_first_calibration(name: str) -> None:
    once = calibrated(QUANTIZERS[name]().eval(), operand_for(name, 1))
    twice = calibrated(QUANTIZERS[name]().eval(), operand_for(name, 0) * 100 + 3)
    calibrated(twice, operand_for(name, 1))
    x = operand_for(name, 2).requires_grad_()
    gradients = [torch.autograd.grad(q(x).sum(), x)[0] for q in (once, twice)]
    assert_close(gradients[1], gradients[0])
    assert_close(twice(x), once(x))


@pytest.mark.parametrize(
    ("kind", "operand"),
    [
        (BinaryWeight, Operand.WEIGHT),
        (BinaryActivation, Operand.KEY),
        (BinaryAttentionMap, Operand.ATTENTION),
    ],
)
def test_a_wider_spec_is_refused_with_the_quantizer_to_use(
    kind: type[Quantizer], operand: Operand
) -> None:
    message = rf"{kind.__name__} offers 1 bits, got 2 for the {operand}; .* use qat.quantizers.LSQ"
    with pytest.raises(ValueError, match=message):
        kind(QuantSpec(2), (4, 1, 4), operand)


# Weights.


def test_binary_weight_equals_alpha_times_the_sign_of_the_centred_row() -> None:
    quantizer = quantize_now(BinaryWeight(ONE_BIT, (2, 4)))
    w = torch.tensor([[3.0, 1.0, 1.0, -1.0], [-0.2, -0.4, -0.6, -0.8]])
    # Means 1 and -0.5, alphas 1.5 and 0.5; centred [2, 0, 0, -2] and [0.3, 0.1, -0.1, -0.3].
    expected = torch.tensor([[1.5, 1.5, 1.5, -1.5], [0.5, 0.5, -0.5, -0.5]])
    assert_close(quantizer(w), expected)


def test_uncentred_binary_weight_takes_the_sign_of_the_weight_itself() -> None:
    quantizer = quantize_now(BinaryWeight(ONE_BIT, (2, 4), centre=False))
    w = torch.tensor([[3.0, 1.0, 0.0, -1.0], [-0.2, -0.4, -0.6, -0.0]])
    expected = torch.tensor([[1.25, 1.25, 1.25, -1.25], [-0.3, -0.3, -0.3, 0.3]])
    assert_close(quantizer(w), expected)


def test_binary_convolution_weight_has_one_alpha_for_each_output_channel() -> None:
    quantizer = quantize_now(BinaryWeight(ONE_BIT, (2, 1, 2, 2)))
    w = torch.tensor([[[[1.0, -1.0], [2.0, -2.0]]], [[[0.0, 8.0], [0.0, 0.0]]]])
    # Means 0 and 2, alphas 1.5 and 2.
    expected = torch.tensor([[[[1.5, -1.5], [1.5, -1.5]]], [[[-2.0, 2.0], [-2.0, -2.0]]]])
    assert_close(quantizer(w), expected)


@pytest.mark.parametrize("centre", [True, False])
def test_binary_weight_gradient_is_the_incoming_one_where_the_latent_is_within_one(
    centre: bool,
) -> None:
    quantizer = quantize_now(BinaryWeight(ONE_BIT, (8, 16), centre=centre))
    w = (torch.randn(8, 16) + 0.5).requires_grad_()
    w.data[:, 0] = 0
    grad = torch.randn(8, 16)
    quantizer(w).backward(grad)
    latent = w.detach() - (w.detach().mean(1, keepdim=True) if centre else 0)
    assert 0 < (latent.abs() <= 1).float().mean() < 1
    assert_close(w.grad, grad * (latent.abs() <= 1), rtol=0, atol=0)


def test_binary_weight_scale_follows_the_latents_without_calibration() -> None:
    quantizer = quantize_now(BinaryWeight(ONE_BIT, (1, 2)))
    w = torch.tensor([[1.0, -3.0]])
    assert_close(quantizer(3 * w), 3 * quantizer(w))
    assert not list(quantizer.parameters())


def test_weight_boundary_distance_is_that_of_the_centred_latent_in_units_of_alpha() -> None:
    quantizer = BinaryWeight(ONE_BIT, (1, 4))
    distance = quantizer.boundary_distance(torch.tensor([[3.0, 1.0, 1.0, -1.0]]))
    assert_close(distance, torch.tensor([[2.0, 0.0, 0.0, 2.0]]) / 1.5)


# Activations.


def test_binary_activation_is_the_sign_of_the_shifted_operand() -> None:
    quantizer = quantize_now(BinaryActivation(ONE_BIT, (3,)))
    quantizer.get_parameter("shift.shift").data.copy_(torch.tensor([0.5, 0.0, -0.5]))
    x = torch.tensor([[0.5, 0.0, -0.6], [0.4, -0.1, -0.4]])
    assert quantizer(x).tolist() == [[1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]


def test_binary_activation_gradients_equal_bi_real_at_the_shifted_operand() -> None:
    quantizer = quantize_now(BinaryActivation(ONE_BIT, (2,)))
    shift = quantizer.get_parameter("shift.shift")
    shift.data.copy_(torch.tensor([0.25, -1.0]))
    x = torch.tensor([[0.25, 0.0], [-0.25, -1.5], [0.5, -1.25]], requires_grad=True)
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    quantizer(x).backward(grad)
    # Shifted: [0, 1], [-0.5, -0.5], [0.25, -0.25]; 2 - 2|u| there: [2, 0], [1, 1], [1.5, 1.5].
    expected = torch.tensor([[2.0, 0.0], [3.0, 4.0], [7.5, 9.0]])
    assert_close(x.grad, expected, rtol=0, atol=0)
    assert_close(shift.grad, -expected.sum(0), rtol=0, atol=0)


@every_shift
def test_every_shift_form_gets_gradients_from_linear_and_attention_operands(
    shift: ShiftFactory,
) -> None:
    for trailing, shape in (((4,), (2, 6, 4)), ((3, 1, 4), (2, 3, 6, 4))):
        quantizer = calibrated(
            BinaryActivation(ONE_BIT, trailing, shift=shift).train(), torch.randn(shape) + 0.3
        )
        (quantizer(torch.randn(shape)) * torch.randn(shape)).sum().backward()
        for key, parameter in quantizer.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
            assert parameter.grad.any(), key


# The attention map.

UNITS = [-0.4, 0.2, 0.4, 0.6, 0.9, 1.5]
"""Attention in units of s: below 0, four points inside, above 1."""


def test_attention_map_takes_the_nearer_of_zero_and_s() -> None:
    a = torch.tensor([0.0, 0.1, 0.2, 0.25, 0.3, 0.45, 0.5, 0.75])
    # In units of s = 0.5: 0, .2, .4, .5 (half to even, so 0), .6, .9, 1, 1.5.
    assert attention_map(0.5)(a).tolist() == [0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5]


def test_attention_map_passes_the_gradient_to_a_inside_only() -> None:
    a = (torch.tensor(UNITS) * 0.5).requires_grad_()
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    attention_map(0.5)(a).backward(grad)
    assert_close(a.grad, torch.tensor([0.0, 2.0, 3.0, 4.0, 5.0, 0.0]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("unit", "expected"), list(zip(UNITS, [0.0, -0.2, -0.4, 0.4, 0.1, 1.0], strict=True))
)
def test_gradient_to_s_is_the_rounding_error_inside_and_one_above(
    unit: float, expected: float
) -> None:
    quantizer = attention_map(0.5)
    quantizer(torch.tensor([0.5 * unit])).backward(torch.tensor([3.0]))
    assert quantizer.scale.grad is not None
    assert quantizer.scale.grad.item() == pytest.approx(3 * expected, abs=1e-6)


def test_gradient_to_s_sums_over_the_whole_map() -> None:
    quantizer = attention_map(0.07)
    a = torch.randn(2, 3, 6, 6).mul(2).softmax(-1)
    grad = torch.randn_like(a)
    quantizer(a).backward(grad)
    u = a / 0.07
    closed_form = torch.where(u < 1, u.round() - u, 1.0)
    assert 0 < (u < 1).float().mean() < 1
    assert_close(quantizer.scale.grad, (grad * closed_form).sum())


def test_a_step_driven_below_zero_counts_by_its_size() -> None:
    positive, negative = attention_map(0.5), attention_map(-0.5)
    a = torch.tensor([0.1, 0.3, 0.75])
    assert torch.equal(negative(a), positive(a))
    for quantizer in (positive, negative):
        quantizer(a).sum().backward()
    assert positive.scale.grad is not None and negative.scale.grad is not None
    assert_close(negative.scale.grad, -positive.scale.grad)


def test_s_starts_at_twice_the_mean_attention_over_batches() -> None:
    quantizer = BinaryAttentionMap(ONE_BIT, (1, 1, 1))
    first = torch.tensor([0.0, 0.1, 0.2, 0.5]).reshape(1, 1, 2, 2)  # mean 0.2
    second = torch.tensor([0.1, 0.4, 0.9, 0.2]).reshape(1, 1, 2, 2)  # mean 0.4
    calibrated(quantizer, first, second)
    assert_close(quantizer.scale.detach(), torch.tensor(0.6))


def test_s_of_a_softmax_starts_at_two_over_the_number_of_tokens() -> None:
    quantizer = BinaryAttentionMap(ONE_BIT, (3, 1, 1))
    calibrated(quantizer, torch.randn(4, 3, 17, 17).softmax(-1))
    assert_close(quantizer.scale.detach(), torch.tensor(2 / 17))


def test_an_attention_map_without_data_cannot_be_frozen() -> None:
    with (
        pytest.raises(RuntimeError, match="saw no data; calibrate"),
        qat.observing(BinaryAttentionMap(ONE_BIT, (1, 1, 1))),
    ):
        pass


def test_attention_boundary_distance_is_the_distance_to_half_of_s() -> None:
    distance = attention_map(0.5).boundary_distance(torch.tensor([0.0, 0.2, 0.25, 0.3, 0.5]))
    assert_close(distance, torch.tensor([0.5, 0.1, 0.0, 0.1, 0.5]))


# The factory.


@pytest.mark.parametrize(
    ("operand", "kind"),
    [
        (Operand.WEIGHT, BinaryWeight),
        (Operand.ATTENTION, BinaryAttentionMap),
        (Operand.INPUT, BinaryActivation),
        (Operand.QUERY, BinaryActivation),
        (Operand.KEY, BinaryActivation),
        (Operand.VALUE, BinaryActivation),
    ],
)
def test_factory_chooses_the_binary_quantizer_by_operand(
    operand: Operand, kind: type[Quantizer]
) -> None:
    quantizer = BinaryQuantizers()(ONE_BIT, (4, 1, 8), operand)
    assert type(quantizer) is kind
    assert quantizer.operand is operand


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("operand", Operand)
def test_factory_gives_more_than_one_bit_to_wider(bits: int, operand: Operand) -> None:
    spec = QuantSpec(bits)
    quantizer = BinaryQuantizers(wider=Affine)(spec, (4, 1, 8), operand)
    assert type(quantizer) is Affine
    assert (quantizer.spec, quantizer.operand) == (spec, operand)
    assert type(BinaryQuantizers()(spec, (4, 1, 8), operand)) is LSQ


def test_factory_hands_on_shift_and_centre() -> None:
    factory = BinaryQuantizers(shift=partial(DynamicShift, gain=1.0), centre=False)
    activation = factory(ONE_BIT, (3,), Operand.INPUT)
    assert activation.get_parameter("shift.gain").tolist() == [1.0, 1.0, 1.0]
    weight = quantize_now(factory(ONE_BIT, (1, 2), Operand.WEIGHT))
    assert weight(torch.tensor([[1.0, 3.0]])).tolist() == [[2.0, 2.0]]

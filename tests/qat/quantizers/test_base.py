"""The life cycle: what each phase does, and who may move it."""

import pytest
import torch
from torch import nn

from qat import Granularity, Operand, Phase, Quantizer, QuantSpec, set_phase
from qat.quantizers import LSQ, Affine, Codes, quantizers

X = torch.tensor([[-2.0, 0.3, 1.0], [0.6, -0.1, 4.0]])


def _calibrated() -> Affine:
    quantizer = Affine(QuantSpec(4), (3,))
    quantizer.observe(X)
    quantizer.freeze()
    return quantizer


class TwoBitsOnly(LSQ):
    supported_bits = range(2, 3)


def test_float_phase_returns_the_very_tensor() -> None:
    quantizer = _calibrated()
    assert quantizer(X) is X


def test_observe_phase_returns_the_very_tensor_and_widens_the_statistics() -> None:
    quantizer = Affine(QuantSpec(4), (3,))
    quantizer.phase = Phase.OBSERVE
    assert quantizer(X) is X
    quantizer.freeze()
    assert quantizer.scale == 4 / 7


def test_quantize_phase_returns_the_fake_quantized_tensor() -> None:
    quantizer = _calibrated()
    quantizer.phase = Phase.QUANTIZE
    assert torch.equal(quantizer(X), quantizer.fake_quantize(X))
    assert not torch.equal(quantizer(X), X)


def test_data_never_moves_the_phase_nor_the_scale() -> None:
    for phase in Phase:
        quantizer = _calibrated()
        before = quantizer.scale.clone()
        quantizer.phase = phase
        quantizer(100 * X)
        assert quantizer.phase is phase
        assert torch.equal(quantizer.scale, before)


def test_observation_keeps_no_autograd_graph() -> None:
    quantizer = Affine(QuantSpec(4), (3,))
    quantizer.phase = Phase.OBSERVE
    quantizer(X.clone().requires_grad_())
    assert not any(buffer.requires_grad for buffer in quantizer.buffers())


def test_arithmetic_is_float32_for_half_precision_inputs() -> None:
    quantizer = _calibrated()
    quantizer.phase = Phase.QUANTIZE
    half = X.bfloat16()
    assert torch.equal(quantizer(half), quantizer.fake_quantize(half.float()).bfloat16())


@pytest.mark.parametrize("phase", Phase)
def test_phase_is_part_of_the_state(phase: Phase) -> None:
    source, target = _calibrated(), Affine(QuantSpec(4), (3,))
    source.phase = phase
    target.load_state_dict(source.state_dict())
    assert target.phase is phase


@pytest.mark.parametrize("make", [LSQ, Affine])
@pytest.mark.parametrize("granularity", Granularity)
def test_every_tensor_of_state_has_its_final_shape_when_the_constructor_returns(
    make: type[Quantizer], granularity: Granularity
) -> None:
    def shapes() -> dict[str, torch.Size]:
        state = (*quantizer.named_parameters(), *quantizer.named_buffers())
        return {name: value.shape for name, value in state}

    quantizer = make(QuantSpec(4, granularity=granularity), (3,))
    before = shapes()
    quantizer.observe(X)
    quantizer.freeze()
    assert shapes() == before


@pytest.mark.parametrize("make", [LSQ, Affine])
def test_one_bit_is_refused_with_the_binary_quantizers_and_the_operand(
    make: type[Quantizer],
) -> None:
    message = rf"{make.__name__} offers 2 to 16 bits, got 1 for the query.*BinaryQuantizers"
    with pytest.raises(ValueError, match=message):
        make(QuantSpec(1), (3,), Operand.QUERY)


def test_width_a_class_does_not_offer_is_refused_with_its_single_width() -> None:
    with pytest.raises(ValueError, match=r"TwoBitsOnly offers 2 bits, got 4 .*LSQ"):
        TwoBitsOnly(QuantSpec(4), (3,))


def test_set_phase_moves_every_quantizer_and_names_are_those_of_modules() -> None:
    model = nn.Sequential(_calibrated(), nn.Sequential(nn.Linear(3, 3), _calibrated()))
    assert [name for name, _ in quantizers(model)] == ["0", "1.1"]
    set_phase(model, Phase.OBSERVE)
    assert {quantizer.phase for _, quantizer in quantizers(model)} == {Phase.OBSERVE}


def test_repr_shows_operand_spec_and_phase() -> None:
    quantizer = LSQ(QuantSpec(3, signed=False), (3,), Operand.ATTENTION)
    assert "attention, 3 bit unsigned, per_tensor, float" in repr(quantizer)


def test_codes_are_mapped_back_with_their_zero_point() -> None:
    quantizer = _calibrated()
    values = torch.tensor([0, 3, 7], dtype=torch.uint8)
    codes = Codes(values, torch.tensor(0.5), torch.tensor(3.0))
    assert torch.equal(quantizer.dequantize(codes), torch.tensor([-1.5, 0.0, 2.0]))

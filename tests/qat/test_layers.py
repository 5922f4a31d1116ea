"""Layers: the product of quantized operands, worked by hand; what stays float stays exact."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from binaryvit.quantizers import BinaryActivation
from qat import Granularity, Operand, Phase, Quantizer, QuantSpec, set_phase
from qat.layers import QuantConv2d, QuantLinear, QuantMatmul, quantized_weights, through
from qat.quantizers import LSQ, Affine


def _frozen(x: Tensor, shape: tuple[int, ...], bits: int = 4, **spec: object) -> Quantizer:
    quantizer = Affine(QuantSpec(bits, **spec), shape)
    quantizer.observe(x)
    quantizer.freeze()
    quantizer.phase = Phase.QUANTIZE
    return quantizer


def test_linear_multiplies_quantized_operands_and_adds_the_float_bias() -> None:
    linear = nn.Linear(2, 1)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -0.3]]))
        linear.bias.fill_(0.123)
    weight = Affine(QuantSpec(2), (1, 2))
    inputs = Affine(QuantSpec(2, signed=False), (2,))
    weight.scale.fill_(0.5)  # 1 clips to code 1 = 0.5, -0.3 is code -1 = -0.5
    inputs.scale.fill_(1.0)  # 2.4 is 2, 9 clips to 3
    layer = QuantLinear(linear, weight, inputs)
    set_phase(layer, Phase.QUANTIZE)
    found = layer(torch.tensor([[2.4, 9.0]]))
    assert torch.equal(found, torch.tensor([[2 * 0.5 - 3 * 0.5 + 0.123]]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(4,), (2, 3), (2, 3, 5)])
def test_linear_without_quantizers_gives_the_bits_of_the_float_layer(
    bias: bool, leading: tuple[int, ...]
) -> None:
    linear, x = nn.Linear(6, 3, bias=bias), torch.randn(*leading, 6)
    assert torch.equal(QuantLinear(linear)(x), linear(x))


@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": 2, "padding": 1},
        {"dilation": 2, "bias": False},
        {"groups": 2, "padding": "same"},
    ],
)
def test_convolution_keeps_the_geometry_of_the_float_layer(arguments: dict[str, object]) -> None:
    conv, x = nn.Conv2d(4, 6, 3, **arguments), torch.randn(2, 4, 9, 9)
    assert torch.equal(QuantConv2d(conv)(x), conv(x))


def test_convolution_multiplies_quantized_operands() -> None:
    conv, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 9, 9)
    per_channel = Granularity.PER_CHANNEL
    weight = _frozen(conv.weight.detach(), (6, 4, 3, 3), granularity=per_channel)
    inputs = _frozen(x, (4, 1, 1), granularity=per_channel)
    expected = F.conv2d(inputs(x), weight(conv.weight), conv.bias, padding=1)
    assert torch.equal(QuantConv2d(conv, weight, inputs)(x), expected)
    assert not torch.equal(expected, conv(x))


def test_padding_other_than_zeros_is_refused() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
    with pytest.raises(ValueError, match=r"pads with zeros only, the layer pads with 'reflect'"):
        QuantConv2d(conv)


@pytest.mark.parametrize("transpose", [True, False])
def test_matmul_quantizes_the_right_operand_before_it_is_transposed(transpose: bool) -> None:
    left = torch.randn(2, 3, 4, 5)
    right = torch.randn(2, 3, 4, 5) if transpose else torch.randn(2, 3, 5, 6)
    left_quantizer = _frozen(left, (3, 1, 5))
    right_quantizer = BinaryActivation(QuantSpec(1), (3, 1, right.shape[-1]))
    nn.init.normal_(right_quantizer.shift.shift)  # a threshold for each feature, the last axis
    right_quantizer.phase = Phase.QUANTIZE
    matmul = QuantMatmul(left_quantizer, right_quantizer, transpose_right=transpose)
    factor = right_quantizer(right)
    expected = left_quantizer(left) @ (factor.mT if transpose else factor)
    assert torch.equal(matmul(left, right), expected)


def test_matmul_with_one_quantizer_keeps_the_other_operand_in_float() -> None:
    left, right = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 4, 5)
    quantizer = _frozen(right, (2, 1, 5))
    assert torch.equal(QuantMatmul(None, quantizer)(left, right), left @ quantizer(right))


def test_phase_of_a_matmul_is_that_of_the_quantizer_it_has() -> None:
    quantizer = LSQ(QuantSpec(4), (1, 1, 4), Operand.VALUE)
    quantizer.phase = Phase.QUANTIZE
    assert QuantMatmul(None, quantizer).phase is Phase.QUANTIZE
    assert QuantMatmul(quantizer, None).phase is Phase.QUANTIZE
    assert QuantMatmul().phase is Phase.FLOAT


def test_operand_without_quantizer_is_passed_as_it_is() -> None:
    x = torch.randn(3)
    assert through(None, x) is x


def test_twins_share_the_parameters_of_the_float_layers() -> None:
    linear, conv = nn.Linear(2, 2), nn.Conv2d(1, 1, 1)
    for twin, layer in ((QuantLinear(linear), linear), (QuantConv2d(conv), conv)):
        assert twin.weight is layer.weight
        assert twin.bias is layer.bias


def test_quantized_weights_lists_layers_whose_weight_is_quantized_only() -> None:
    def linear(weight: Quantizer | None, inputs: Quantizer | None) -> QuantLinear:
        return QuantLinear(nn.Linear(2, 2), weight, inputs)

    quantizer = LSQ(QuantSpec(4), (2, 2), Operand.WEIGHT)
    model = nn.Sequential(linear(quantizer, None), linear(None, LSQ(QuantSpec(4), (2,))))
    ((name, weight, found),) = quantized_weights(model)
    assert (name, weight, found) == ("0", model[0].weight, quantizer)

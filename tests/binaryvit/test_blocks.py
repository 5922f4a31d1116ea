import pytest
import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from binaryvit.blocks import ContextShortcut, ReactLinear, ReactMlp, RPReLU, shortcut
from binaryvit.ops import sign
from binaryvit.quantizers import BinaryActivation, BinaryWeight
from qat import Phase, QuantSpec, set_phase
from qat.layers import QuantLinear

ONE_BIT = QuantSpec(1)


def react_linear(linear: nn.Linear) -> ReactLinear:
    """The binary twin of a linear layer, in phase FLOAT."""
    shape = (linear.out_features, linear.in_features)
    input_quantizer = BinaryActivation(ONE_BIT, (linear.in_features,))
    return ReactLinear(linear, BinaryWeight(ONE_BIT, shape), input_quantizer)


def randomize(module: nn.Module) -> None:
    """Move every parameter off its start, so that each one matters."""
    for parameter in module.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))


def repeat_or_average(x: Tensor, width: int) -> Tensor:
    """The shortcut in index notation: channel o carries o mod inputs, or the mean of its group."""
    inputs = x.shape[-1]
    group = inputs // width
    return torch.stack(
        [
            x[..., o % inputs] if group < 1 else x[..., o * group : (o + 1) * group].mean(-1)
            for o in range(width)
        ],
        -1,
    )


def react_by_hand(layer: ReactLinear, x: Tensor) -> Tensor:
    """RPReLU(LayerNorm(alpha sign(W~) sign(x - b) + bias) + shortcut), written out."""
    w = layer.weight
    alpha = w.abs().mean(1)
    signs = sign(w - w.mean(1, keepdim=True))
    inputs = sign(x - layer.get_parameter("input_quantizer.shift.shift"))
    y = torch.einsum("...i,oi->...o", inputs, signs) * alpha + layer.bias
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    y = y * layer.norm.weight + layer.norm.bias + repeat_or_average(x, layer.out_features)
    y = y - layer.act.before
    return torch.where(y > 0, y, y * layer.act.slope) + layer.act.after


def test_rprelu_equals_its_golden_values() -> None:
    act = RPReLU(2)
    act.before.data.copy_(torch.tensor([1.0, -1.0]))
    act.after.data.copy_(torch.tensor([10.0, 20.0]))
    act.slope.data.copy_(torch.tensor([0.5, 0.1]))
    # Channel 0: x - 1 is -3, 0, 2; channel 1: x + 1 is -1, 2, 4.
    x = torch.tensor([[-2.0, -2.0], [1.0, 1.0], [3.0, 3.0]])
    assert_close(act(x), torch.tensor([[8.5, 19.9], [10.0, 22.0], [12.0, 24.0]]))


def test_rprelu_starts_as_a_prelu_with_slope_a_quarter() -> None:
    x = torch.randn(5, 3)
    assert_close(RPReLU(3)(x), nn.PReLU(3)(x))


def test_rprelu_gradients_equal_their_closed_form() -> None:
    act = RPReLU(3)
    randomize(act)
    x = torch.randn(4, 5, 3, requires_grad=True)
    grad = torch.randn(4, 5, 3)
    act(x).backward(grad)
    bent = x.detach() - act.before.detach()
    slope = torch.where(bent > 0, 1.0, act.slope.detach())
    assert_close(x.grad, grad * slope)
    assert_close(act.before.grad, -(grad * slope).sum((0, 1)))
    assert_close(act.slope.grad, (grad * bent.clamp(max=0)).sum((0, 1)))
    assert_close(act.after.grad, grad.sum((0, 1)))


def test_shortcut_repeats_channels_to_widen() -> None:
    x = torch.tensor([[1.0, 3.0]])
    assert shortcut(x, 6).tolist() == [[1.0, 3.0, 1.0, 3.0, 1.0, 3.0]]


def test_shortcut_averages_neighbouring_channels_to_narrow() -> None:
    x = torch.tensor([[1.0, 3.0, -5.0, 1.0, 0.0, 10.0]])
    assert shortcut(x, 3).tolist() == [[2.0, -2.0, 5.0]]


def test_shortcut_between_equal_widths_is_the_identity() -> None:
    x = torch.randn(2, 3, 5)
    assert torch.equal(shortcut(x, 5), x)


@pytest.mark.parametrize("phase", [Phase.FLOAT, Phase.OBSERVE])
@pytest.mark.parametrize(("inputs", "outputs"), [(6, 6), (6, 18), (24, 6)])
def test_react_linear_equals_the_float_layer_until_it_quantizes(
    phase: Phase, inputs: int, outputs: int
) -> None:
    linear = nn.Linear(inputs, outputs)
    layer = react_linear(linear)
    set_phase(layer, phase)
    x = torch.randn(3, 7, inputs)
    assert torch.equal(layer(x), linear(x))


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 6), (6, 18), (24, 6)])
def test_quantizing_react_linear_equals_the_written_out_formula(inputs: int, outputs: int) -> None:
    layer = react_linear(nn.Linear(inputs, outputs))
    randomize(layer)
    set_phase(layer, Phase.QUANTIZE)
    x = torch.randn(3, 7, inputs)
    x[0, 0] = 0
    assert_close(layer(x), react_by_hand(layer, x))


def test_react_linear_shares_the_parameters_of_the_float_layer() -> None:
    linear = nn.Linear(4, 8)
    layer = react_linear(linear)
    assert layer.weight is linear.weight and layer.bias is linear.bias


def test_the_shortcut_of_react_linear_carries_the_input_before_its_binarization() -> None:
    layer = react_linear(nn.Linear(4, 4))
    set_phase(layer, Phase.QUANTIZE)
    x = torch.rand(3, 4) + 0.5
    # Same signs, so a difference can only come by the shortcut; RPReLU starts linear above zero.
    difference = layer(x + 20) - layer(x + 10)
    assert_close(difference, torch.full((3, 4), 10.0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 10), (10, 6), (64, 10)])
def test_widths_without_a_shortcut_are_refused_with_both_widths(inputs: int, outputs: int) -> None:
    message = f"no shortcut from {inputs} to {outputs} features.* by an earlier rule"
    with pytest.raises(ValueError, match=message):
        react_linear(nn.Linear(inputs, outputs))


def test_context_shortcut_adds_queries_keys_and_values_to_the_normalized_context() -> None:
    context = ContextShortcut(2)
    context.norm.weight.data.copy_(torch.tensor([1.0, 2.0]))
    context.norm.bias.data.copy_(torch.tensor([0.0, 0.5]))
    x, q, k, v = (
        torch.tensor(p).reshape(1, 1, 1, 2)
        for p in ([1.0, 3.0], [0.1, 0.2], [10, 20.0], [100, 200.0])
    )
    # The normalized context is [-1, 1], scaled and shifted [-1, 2.5].
    assert_close(context(x, q, k, v).flatten(), torch.tensor([109.1, 222.7]))


def test_context_shortcut_normalizes_each_head_alone() -> None:
    context = ContextShortcut(4)
    x = torch.randn(2, 3, 5, 4)
    zero = torch.zeros_like(x)
    louder = x * torch.tensor([1.0, 100.0, 1.0]).reshape(3, 1, 1)
    assert_close(context(louder, zero, zero, zero), context(x, zero, zero, zero), rtol=0, atol=1e-2)


def quantized_mlp(mlp: Mlp, first: bool) -> ReactMlp:
    """An MLP twin whose second layer, and first if asked, are react layers."""
    twin = ReactMlp(mlp)
    if first:
        twin.fc1 = react_linear(mlp.fc1)
    twin.fc2 = react_linear(mlp.fc2)
    return twin


@pytest.mark.parametrize("phase", [Phase.FLOAT, Phase.OBSERVE])
def test_react_mlp_equals_the_float_mlp_until_it_quantizes(phase: Phase) -> None:
    mlp = Mlp(6, 24, norm_layer=nn.LayerNorm)
    twin = quantized_mlp(mlp, first=True)
    set_phase(twin, phase)
    x = torch.randn(3, 5, 6)
    assert torch.equal(twin(x), mlp(x))


def test_react_mlp_drops_the_activation_while_its_first_layer_quantizes() -> None:
    twin = quantized_mlp(Mlp(6, 24), first=True)
    randomize(twin)
    set_phase(twin, Phase.QUANTIZE)
    x = torch.randn(3, 5, 6)
    expected = react_by_hand(twin.fc2, react_by_hand(twin.fc1, x))
    assert_close(twin(x), expected)
    assert not torch.allclose(twin(x), react_by_hand(twin.fc2, F.gelu(react_by_hand(twin.fc1, x))))


@pytest.mark.parametrize("plain", [True, False])
def test_react_mlp_keeps_the_activation_where_its_first_layer_has_no_rprelu(plain: bool) -> None:
    mlp = Mlp(6, 24)
    twin = quantized_mlp(mlp, first=False)
    if plain:
        twin.fc1 = QuantLinear(mlp.fc1, BinaryWeight(ONE_BIT, (24, 6)))
    randomize(twin)
    set_phase(twin, Phase.QUANTIZE)
    x = torch.randn(3, 5, 6)
    assert_close(twin(x), react_by_hand(twin.fc2, F.gelu(twin.fc1(x))))

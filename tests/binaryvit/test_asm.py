from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from binaryvit.asm import (
    DynamicShift,
    ScaledShift,
    Shift,
    ShiftFactory,
    StandardizedShift,
    StaticShift,
)
from binaryvit.ops import binarize_activation, sign

FULL_MEAN = partial(DynamicShift, gain=1.0)
PER_IMAGE: dict[str, ShiftFactory] = {
    "static": StaticShift,
    "dynamic": FULL_MEAN,
    "scaled": ScaledShift,
    "standardized": StandardizedShift,
}

# Two images, two tokens, three channels; and two images, two heads, two tokens, one channel a head.
LINEAR = torch.tensor([[[1.0, 2.0, 3.0], [3.0, -2.0, 0.0]], [[5.0, 0.0, 1.0], [7.0, 4.0, -1.0]]])
ATTENTION = torch.tensor([[[[1.0], [3.0]], [[0.0], [-4.0]]], [[[5.0], [7.0]], [[2.0], [2.0]]]])


def with_shift(shift: Shift, values: list[float]) -> Shift:
    """The module, in evaluation mode, with its learned threshold set."""
    shift.shift.data.copy_(torch.tensor(values).reshape(shift.shape))
    return shift.eval()


def bi_real(u: Tensor) -> Tensor:
    """Bi-Real Net's surrogate derivative of the sign."""
    return torch.where(u.abs() <= 1, 2 - 2 * u.abs(), 0.0)


def channels_by_loop(x: Tensor, shape: tuple[int, ...]) -> list[list[float]]:
    """All values of every channel, in the order of the trailing shape."""
    if len(shape) == 1:
        return [x[..., c].flatten().tolist() for c in range(shape[0])]
    heads, _, width = shape
    return [x[:, h, :, d].flatten().tolist() for h in range(heads) for d in range(width)]


def moments_by_loop(x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, one at a time."""
    means, variances = [], []
    for values in channels_by_loop(x, shape):
        means.append(sum(values) / len(values))
        variances.append(sum((v - means[-1]) ** 2 for v in values) / len(values))
    return torch.tensor(means).reshape(shape), torch.tensor(variances).reshape(shape)


# A1.


def test_static_shift_subtracts_one_threshold_for_each_channel() -> None:
    linear = with_shift(StaticShift((3,)), [1.0, -1.0, 0.5])
    expected = [[[0.0, 3.0, 2.5], [2.0, -1.0, -0.5]], [[4.0, 1.0, 0.5], [6.0, 5.0, -1.5]]]
    assert_close(linear(LINEAR), torch.tensor(expected))
    attention = with_shift(StaticShift((2, 1, 1)), [1.0, -2.0])
    expected = [[[[0.0], [2.0]], [[2.0], [-2.0]]], [[[4.0], [6.0]], [[4.0], [4.0]]]]
    assert_close(attention(ATTENTION), torch.tensor(expected))


# A2.


def test_dynamic_shift_also_subtracts_the_share_of_the_mean_over_the_tokens_of_the_image() -> None:
    linear = with_shift(DynamicShift((3,), gain=0.5), [1.0, 0.0, 0.0])
    # Token means [2, 0, 1.5] and [6, 2, 0], so thresholds [2, 0, 0.75] and [4, 1, 0].
    expected = [[[-1.0, 2.0, 2.25], [1.0, -2.0, -0.75]], [[1.0, -1.0, 1.0], [3.0, 3.0, -1.0]]]
    assert_close(linear(LINEAR), torch.tensor(expected))
    attention = with_shift(DynamicShift((2, 1, 1), gain=0.5), [0.0, 1.0])
    # Token means [2, -2] and [6, 2], so thresholds [1, 0] and [3, 2].
    expected = [[[[0.0], [2.0]], [[0.0], [-4.0]]], [[[2.0], [4.0]], [[0.0], [0.0]]]]
    assert_close(attention(ATTENTION), torch.tensor(expected))


def test_dynamic_shift_has_one_gain_for_each_channel() -> None:
    shift = DynamicShift((3,))
    shift.gain.data.copy_(torch.tensor([0.0, 1.0, -1.0]))
    # Token means of the first image: [2, 0, 1.5].
    expected = torch.tensor([[1.0, 2.0, 4.5], [3.0, -2.0, 1.5]])
    assert_close(shift(LINEAR)[0], expected)


@pytest.mark.parametrize(("trailing", "shape"), [((4,), (3, 6, 4)), ((2, 1, 4), (3, 2, 6, 4))])
def test_dynamic_shift_without_gain_equals_the_static_shift(
    trailing: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    dynamic, static = DynamicShift(trailing, gain=0.0), StaticShift(trailing)
    dynamic.shift.data.copy_(torch.randn(trailing))
    static.load_state_dict({"shift": dynamic.shift.data})
    x = torch.randn(shape)
    assert torch.equal(dynamic(x), static(x))


@pytest.mark.parametrize("name", PER_IMAGE)
@pytest.mark.parametrize(
    ("trailing", "shape"),
    [
        pytest.param((4,), (3, 6, 4), id="tokens"),
        pytest.param((2, 1, 4), (3, 2, 6, 4), id="attention"),
        pytest.param((4,), (3, 5, 6, 4), id="grid-of-tokens"),
        pytest.param((4,), (3, 4), id="pooled"),
        pytest.param((4, 1, 1), (3, 4, 5, 6), id="convolution"),
    ],
)
def test_the_shift_of_an_image_does_not_depend_on_the_other_images(
    name: str, trailing: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    shift = PER_IMAGE[name](trailing)
    shift.shift.data.copy_(torch.randn(trailing))
    shift.calibrate(torch.randn(shape))
    shift.eval()
    x = torch.randn(shape)
    others = torch.cat([x[:1], 100 * x[1:]])
    assert_close(shift(others)[0], shift(x)[0])


@pytest.mark.parametrize(
    ("trailing", "x"),
    [
        pytest.param((1,), torch.tensor([1.0, 2.0, 3.0, 6.0]).reshape(1, 2, 2, 1), id="grid"),
        pytest.param((1, 1, 1), torch.tensor([1.0, 2.0, 3.0, 6.0]).reshape(1, 1, 2, 2), id="conv"),
    ],
)
def test_the_tokens_of_an_image_may_form_a_grid(trailing: tuple[int, ...], x: Tensor) -> None:
    assert FULL_MEAN(trailing)(x).flatten().tolist() == [-2.0, -1.0, 0.0, 3.0]


def test_dynamic_shift_gradient_includes_the_path_through_the_mean() -> None:
    shift = DynamicShift((2,), gain=0.5)
    x = torch.randn(1, 4, 2, requires_grad=True)
    grad = torch.randn(1, 4, 2)
    shift(x).backward(grad)
    # y_t = x_t - b - g * mean(x), so d x_t = grad_t - g * mean(grad), d b = -sum(grad) and
    # d g = -sum(grad) * mean(x).
    assert_close(x.grad, grad - 0.5 * grad.mean(1, keepdim=True))
    assert_close(shift.shift.grad, -grad.sum((0, 1)))
    assert_close(shift.gain.grad, -(grad.sum(1) * x.detach().mean(1)).sum(0))


# A3.


def test_scaled_shift_divides_by_the_size_of_the_scale() -> None:
    linear = with_shift(ScaledShift((3,)), [1.0, 0.0, -1.0])
    linear.get_parameter("scale").data.copy_(torch.tensor([2.0, -0.5, 4.0]))
    expected = [[[0.0, 4.0, 1.0], [1.0, -4.0, 0.25]], [[2.0, 0.0, 0.5], [3.0, 8.0, 0.0]]]
    assert_close(linear(LINEAR), torch.tensor(expected))
    attention = with_shift(ScaledShift((2, 1, 1)), [1.0, 0.0])
    attention.get_parameter("scale").data.copy_(torch.tensor([2.0, 4.0]).reshape(2, 1, 1))
    expected = [[[[0.0], [1.0]], [[0.0], [-1.0]]], [[[2.0], [3.0]], [[0.5], [0.5]]]]
    assert_close(attention(ATTENTION), torch.tensor(expected))


@given(
    scale=st.floats(-50, 50, width=32),
    shift=st.sampled_from([-1.5, -0.25, 0.0, 0.5, 2.0]),  # no subnormals, which divide to zero
    seed=st.integers(0, 10_000),
)
def test_the_scale_of_a_scaled_shift_changes_no_sign(scale: float, shift: float, seed: int) -> None:
    x = torch.randn(2, 8, 1, generator=torch.Generator().manual_seed(seed))
    x[0, 0], x[0, 1] = shift, 0  # on the threshold, and zero
    scaled = with_shift(ScaledShift((1,)), [shift])
    scaled.get_parameter("scale").data.fill_(scale)
    assert torch.equal(sign(scaled(x)), sign(x - torch.tensor(shift)))


def test_the_scale_of_a_scaled_shift_is_the_half_width_of_the_gradient_window() -> None:
    shift = with_shift(ScaledShift((3,)), [0.5, 0.5, 0.5])
    scale = shift.get_parameter("scale")
    scale.data.copy_(torch.tensor([0.5, 1.0, 4.0]))
    x = torch.linspace(-4.2, 4.8, 31).reshape(1, 31, 1).expand(1, 31, 3).clone()
    x[0, 0] = 0.5  # on the threshold
    x.requires_grad_()
    grad = torch.randn(1, 31, 3)
    binarize_activation(shift(x)).backward(grad)
    u = (x.detach() - 0.5) / scale.detach()
    assert_close(x.grad, grad * bi_real(u) / scale.detach(), rtol=1e-5, atol=1e-6)
    inside = (x.detach() - 0.5).abs() < scale.detach()
    assert x.grad is not None and torch.equal(x.grad != 0, inside)
    # d u / d s = -u / s and d u / d b = -1 / s.
    assert_close(scale.grad, -(grad * bi_real(u) * u / scale.detach()).sum((0, 1)))
    assert_close(shift.shift.grad, -(grad * bi_real(u) / scale.detach()).sum((0, 1)))


@pytest.mark.parametrize(("trailing", "shape"), [((3,), (4, 6, 3)), ((2, 1, 3), (4, 2, 6, 3))])
def test_the_scale_starts_at_the_mean_deviation_of_the_calibration_batches(
    trailing: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    shift = ScaledShift(trailing)
    batches = [torch.randn(shape) * torch.arange(1, 4) * factor + 2 for factor in (1, 5, 0.5)]
    for batch in batches:
        shift.calibrate(batch)
    deviations = [moments_by_loop(batch, trailing)[1].sqrt() for batch in batches]
    assert_close(shift.scale.detach(), sum(deviations, torch.zeros(trailing)) / 3)


def test_a_constant_channel_gets_a_small_positive_scale_and_finite_gradients() -> None:
    shift = ScaledShift((1,))
    shift.calibrate(torch.full((2, 3, 1), 7.0))
    assert shift.scale.item() == pytest.approx(1e-3)
    x = torch.zeros(2, 3, 1, requires_grad=True)
    binarize_activation(shift(x)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


# A4.


def standardized(mean: list[float], variance: list[float], shape: tuple[int, ...]) -> Shift:
    """A4 with given running statistics."""
    shift = StandardizedShift(shape)
    shift.mean.copy_(torch.tensor(mean).reshape(shape))
    shift.variance.copy_(torch.tensor(variance).reshape(shape))
    return shift


def test_standardized_shift_standardizes_by_running_statistics_and_then_shifts() -> None:
    linear = with_shift(standardized([1, 0, -1], [4, 0.25, 1], (3,)), [0.0, 1.0, -2.0])
    # (x - [1, 0, -1]) / [2, 0.5, 1] - [0, 1, -2]
    expected = [[[0.0, 3.0, 6.0], [1.0, -5.0, 3.0]], [[2.0, -1.0, 4.0], [3.0, 7.0, 2.0]]]
    assert_close(linear(LINEAR), torch.tensor(expected), rtol=1e-5, atol=2e-5)
    attention = with_shift(standardized([1, -2], [4, 16], (2, 1, 1)), [0.5, 0.0])
    expected = [[[[-0.5], [0.5]], [[0.5], [-0.5]]], [[[1.5], [2.5]], [[1.0], [1.0]]]]
    assert_close(attention(ATTENTION), torch.tensor(expected), rtol=1e-5, atol=2e-5)


@given(variance=st.floats(0, 2500, width=32), seed=st.integers(0, 10_000))
def test_the_deviation_of_a_standardized_shift_changes_no_sign(variance: float, seed: int) -> None:
    x = torch.randn(2, 8, 1, generator=torch.Generator().manual_seed(seed))
    x[0, 0], x[0, 1] = 0.25, 0  # on the mean, and zero
    shift = standardized([0.25], [variance], (1,)).eval()
    assert torch.equal(sign(shift(x)), sign(x - 0.25))


def test_the_deviation_of_a_standardized_shift_rescales_the_gradient_window() -> None:
    shift = standardized([0.5, 0.5], [0.25, 16], (2,)).eval()
    x = torch.linspace(-4.3, 4.7, 31).reshape(1, 31, 1).expand(1, 31, 2).clone()
    x[0, 0] = 0.5  # on the mean
    x.requires_grad_()
    grad = torch.randn(1, 31, 2)
    binarize_activation(shift(x)).backward(grad)
    deviation = torch.tensor([0.25 + 1e-6, 16 + 1e-6]).sqrt()
    u = (x.detach() - 0.5) / deviation
    assert_close(x.grad, grad * bi_real(u) / deviation, rtol=1e-5, atol=1e-6)
    assert x.grad is not None and torch.equal(x.grad != 0, u.abs() < 1)


@pytest.mark.parametrize(("trailing", "shape"), [((3,), (4, 6, 3)), ((2, 1, 3), (4, 2, 6, 3))])
def test_calibration_averages_the_moments_of_the_batches(
    trailing: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    shift = StandardizedShift(trailing)
    first, second = torch.randn(shape) * 3 + 1, torch.randn(shape) * torch.arange(1, 4) - 2
    shift.calibrate(first)
    shift.calibrate(second)
    (mean_1, variance_1), (mean_2, variance_2) = (
        moments_by_loop(batch, trailing) for batch in (first, second)
    )
    assert_close(shift.mean, (mean_1 + mean_2) / 2)
    assert_close(shift.variance, (variance_1 + variance_2) / 2)


@pytest.mark.parametrize(("trailing", "shape"), [((3,), (4, 6, 3)), ((2, 1, 3), (4, 2, 6, 3))])
def test_running_statistics_move_by_the_momentum_in_training(
    trailing: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    shift = StandardizedShift(trailing, momentum=0.1).train()
    x = torch.randn(shape) * 3 + 1
    shift(x)
    mean, variance = moments_by_loop(x, trailing)
    assert_close(shift.mean, 0.1 * mean)
    assert_close(shift.variance, 0.9 + 0.1 * variance)


def test_running_statistics_stand_still_in_evaluation() -> None:
    shift = standardized([1, 2, 3], [4, 5, 6], (3,)).eval()
    shift(LINEAR)
    assert shift.get_buffer("mean").tolist() == [1.0, 2.0, 3.0]
    assert shift.get_buffer("variance").tolist() == [4.0, 5.0, 6.0]


def test_training_normalizes_by_the_running_statistics_too() -> None:
    shift = StandardizedShift((3,), momentum=0.2).train()
    trained = shift(LINEAR)
    assert torch.equal(trained, shift.eval()(LINEAR))


def test_gradients_are_those_of_their_own_forward_although_the_statistics_move_on() -> None:
    shift = StandardizedShift((1,), momentum=0.5).train()
    first = torch.tensor([[[1.0], [3.0]]], requires_grad=True)
    second = torch.tensor([[[0.0], [8.0]]], requires_grad=True)
    outputs = shift(first), shift(second)
    sum(2 * y.sum() for y in outputs).backward()
    # Batch variances 1 and 16; running: (1 + 1) / 2 = 1, then (1 + 16) / 2 = 8.5.
    assert_close(first.grad, torch.full((1, 2, 1), 2.0))
    assert_close(second.grad, torch.full((1, 2, 1), 2 / 8.5**0.5))
    assert_close(shift.shift.grad, torch.tensor([-8.0]))


def test_at_inference_a_standardized_shift_folds_into_one_threshold() -> None:
    shift = with_shift(standardized([1, 0, -1], [4, 0.25, 1], (3,)), [0.3, -1.2, 0.7])
    x = torch.randn(16, 10, 3) * 2
    threshold = torch.tensor([1 + 2 * 0.3, 0 - 0.5 * 1.2, -1 + 0.7])
    clear = (x - threshold).abs() > 1e-4  # rounding decides nearer ones
    assert clear.float().mean() > 0.99
    assert torch.equal(sign(shift(x))[clear], sign(x - threshold)[clear])


# What the abstracts claim of the module.


@pytest.mark.parametrize("name", ["dynamic", "standardized"])
def test_centring_revives_channels_that_a_zero_threshold_leaves_dead(name: str) -> None:
    x = torch.randn(8, 50, 16) + torch.linspace(-8, 8, 16)
    shift = PER_IMAGE[name]((16,))
    shift.calibrate(x)
    shares = (sign(shift.eval()(x)) > 0).float().mean((0, 1))
    naive = (sign(x) > 0).float().mean((0, 1))
    assert ((naive < 0.02) | (naive > 0.98)).sum() >= 8
    assert ((shares > 0.3) & (shares < 0.7)).all()

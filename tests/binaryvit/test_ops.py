import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from binaryvit.ops import binarize_activation, binarize_weight, row_mean, sign

reals = st.floats(-4, 4, width=32)


def bi_real(x: float) -> float:
    """Derivative of Bi-Real Net's piecewise quadratic approximation of the sign."""
    if -1 <= x <= 0:
        return 2 + 2 * x
    if 0 < x <= 1:
        return 2 - 2 * x
    return 0.0


def test_sign_of_both_zeros_is_plus_one() -> None:
    x = torch.tensor([-2.0, -1e-30, -0.0, 0.0, 1e-30, 3.0])
    assert_close(sign(x), torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, 1.0]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sign_keeps_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    expected = torch.tensor([-1, 1, 1], dtype=dtype)
    assert_close(sign(torch.tensor([-0.5, 0.0, 0.5], dtype=dtype)), expected, rtol=0, atol=0)


@given(st.lists(reals, min_size=1, max_size=30))
def test_sign_has_two_values_that_agree_with_the_input(values: list[float]) -> None:
    signs = sign(torch.tensor(values)).tolist()
    assert signs == [1.0 if value >= 0 else -1.0 for value in values]


@given(st.lists(reals, min_size=1, max_size=30))
def test_sign_is_idempotent(values: list[float]) -> None:
    once = sign(torch.tensor(values))
    assert torch.equal(sign(once), once)


def test_sign_does_not_write_into_its_input() -> None:
    x = torch.tensor([-2.0, 0.0, 2.0])
    sign(x)
    assert x.tolist() == [-2.0, 0.0, 2.0]


def test_row_mean_of_a_linear_weight_is_the_mean_over_inputs() -> None:
    w = torch.tensor([[1.0, 2.0, 6.0], [-1.0, 0.0, 4.0]])
    assert_close(row_mean(w), torch.tensor([[3.0], [1.0]]))


def test_row_mean_of_a_convolution_weight_is_the_mean_over_channels_and_window() -> None:
    first = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]  # mean 4.5
    second = [[[0.0, 0.0], [0.0, 0.0]], [[-8.0, 0.0], [0.0, 0.0]]]  # mean -1
    expected = torch.tensor([4.5, -1.0]).reshape(2, 1, 1, 1)
    assert_close(row_mean(torch.tensor([first, second])), expected)


def test_binary_weight_is_the_scale_times_the_sign_of_the_centred_latent() -> None:
    w = torch.tensor([[3.0, 1.0, -1.0], [-4.0, -2.0, 0.0]])
    centred = torch.tensor([[2.0, 0.0, -2.0], [-2.0, 0.0, 2.0]])  # row means 1 and -2
    scale = torch.tensor([[5 / 3], [2.0]])  # row means of |w|
    expected = torch.tensor([[5 / 3, 5 / 3, -5 / 3], [-2.0, 2.0, 2.0]])
    assert_close(binarize_weight(w, centred, scale), expected, rtol=0, atol=0)


def test_binary_weight_gradient_is_clipped_by_the_centred_latent_without_the_scale() -> None:
    # Below, on, inside, zero, on and above the clip bounds; the row mean -6.5 must not matter.
    centred = torch.tensor([[-1.5, -1.0, -0.5, 0.0, 1.0, 1.5]])
    w = (centred - 6.5).requires_grad_()
    grad = torch.tensor([[10.0, 20.0, 30.0, 40.0, 50.0, 60.0]])
    binarize_weight(w, centred, torch.tensor([[7.0]])).backward(grad)
    assert_close(w.grad, torch.tensor([[0.0, 20.0, 30.0, 40.0, 50.0, 0.0]]), rtol=0, atol=0)


def test_binary_weight_passes_no_gradient_through_scale_or_centring() -> None:
    w = torch.tensor([[0.9, 0.2, -0.3, 0.0], [2.0, -2.0, 0.5, -0.5]], requires_grad=True)
    centred, scale = w - row_mean(w), row_mean(w.abs())
    grad = torch.tensor([[1.0, -2.0, 3.0, -4.0], [5.0, 6.0, -7.0, 8.0]])
    binarize_weight(w, centred, scale).backward(grad)
    # Centred rows: [0.7, 0, -0.5, -0.2] and [2, -2, 0.5, -0.5].
    expected = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.0, 0.0, -7.0, 8.0]])
    assert_close(w.grad, expected, rtol=0, atol=0)


def test_binary_activation_is_the_sign() -> None:
    x = torch.tensor([-7.0, -0.5, -0.0, 0.0, 0.5, 7.0])
    assert binarize_activation(x).tolist() == [-1.0, -1.0, 1.0, 1.0, 1.0, 1.0]


def test_binary_activation_gradient_equals_bi_real_at_hand_picked_points() -> None:
    x = torch.tensor([-1.5, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5], requires_grad=True)
    binarize_activation(x).sum().backward()
    expected = torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0, 1.0, 0.0, 0.0])
    assert_close(x.grad, expected, rtol=0, atol=0)


@given(st.lists(st.tuples(reals, reals), min_size=1, max_size=30))
def test_binary_activation_gradient_is_the_incoming_one_times_bi_real(
    pairs: list[tuple[float, float]],
) -> None:
    values, gradients = zip(*[*pairs, (0.0, 3.0)], strict=True)
    x = torch.tensor(values, requires_grad=True)
    binarize_activation(x).backward(torch.tensor(gradients))
    expected = torch.tensor([g * bi_real(v) for v, g in zip(values, gradients, strict=True)])
    assert_close(x.grad, expected, rtol=1e-6, atol=1e-6)

"""Rotations: orthogonality, Hadamard matrices, the greedy search, the salient layer."""

import math
from typing import get_args

import pytest
import torch
from scipy.linalg import hadamard as scipy_hadamard
from torch import Tensor
from torch.testing import assert_close

from qat.transforms import Dual, Hadamard
from qat.transforms.rotation import (
    Rule,
    base_rotation,
    block_size,
    deal_channels,
    dual_transformation,
    fluctuation,
    greedy_rotation,
    hadamard,
    hadamard_factors,
    signs_of_paley,
    smoothing_scale,
    sylvester,
)

WIDTH, GROUP = 1152, 128
SIZES = (1, 2, 12, 20, 24, 28, 36, 40, 44, 60, 64, 192, 384, 768, 1152)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _mild(tokens: int = 512, width: int = WIDTH) -> Tensor:
    return 0.5 * torch.randn(tokens, width, generator=_generator())


def _salient(tokens: int = 512) -> Tensor:
    """Notes 4.3: two channels that are huge in every token."""
    x = _mild(tokens)
    x[:, 100] += 60
    x[:, 700] -= 120
    return x


@pytest.mark.parametrize("size", SIZES)
def test_hadamard_is_orthogonal_with_entries_of_one_magnitude(size: int) -> None:
    matrix = hadamard(size)
    assert (matrix @ matrix.T - torch.eye(size)).abs().max() < 1e-5
    assert_close(matrix.abs(), torch.full_like(matrix, 1 / math.sqrt(size)))


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_powers_of_two_are_those_of_scipy(size: int) -> None:
    assert torch.equal(sylvester(size), torch.from_numpy(scipy_hadamard(size)).float())


def test_known_factors_are_the_smallest_that_work() -> None:
    found = {size: hadamard_factors(size)[0] for size in (64, 1152, 768, 3072, 40, 28, 36)}
    assert found == {64: 1, 1152: 36, 768: 12, 3072: 12, 40: 20, 28: 28, 36: 36}


def test_second_kind_of_paley_is_symmetric_and_integral() -> None:
    for size in (28, 36):
        matrix = signs_of_paley(size)
        assert torch.equal(matrix, matrix.T)
        assert torch.equal(matrix @ matrix, size * torch.eye(size))


@pytest.mark.parametrize("size", [3, 6, 49, 92])
def test_size_without_a_known_matrix_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"no Hadamard matrix of size {size} .* dual"):
        hadamard(size)


def test_fluctuation_is_the_root_mean_square() -> None:
    assert fluctuation(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])) == pytest.approx(2.5)
    assert fluctuation(2 * _mild()) == pytest.approx(1.0, abs=0.005)
    assert fluctuation(_mild()) == pytest.approx(0.5, abs=0.003)
    assert fluctuation(_salient()) == pytest.approx(3.98, abs=0.01)


@pytest.mark.parametrize("size", [1, 2, 64, 128])
def test_base_rotation_spreads_channel_zero_evenly_and_is_orthogonal(size: int) -> None:
    base = base_rotation(size, _generator())
    assert_close(base[0], torch.full((size,), 1 / math.sqrt(size)))
    assert (base @ base.T - torch.eye(size)).abs().max() < 1e-5


def test_one_greedy_step_moves_the_extreme_channel_onto_all() -> None:
    """A single huge channel becomes constant: peak 8 turns into 8 / sqrt(4) everywhere."""
    x = torch.zeros(1, 4)
    x[0, 2] = 8.0
    rotation = greedy_rotation(x, 4, _generator(), num_steps=1)
    assert_close((x @ rotation).abs(), torch.full((1, 4), 4.0))


def test_greedy_rotation_never_raises_the_range() -> None:
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0]])  # flat already: any rotation would raise it
    assert torch.equal(greedy_rotation(x, 4, _generator()), torch.eye(4))


@pytest.mark.parametrize("rule", get_args(Rule))
def test_parts_of_the_dual_transformation_are_rotations_and_a_permutation(rule: Rule) -> None:
    first, order, second = dual_transformation(
        _salient(64), GROUP, _generator(), num_steps=40, rule=rule
    )
    for block in (first, second):
        assert (block @ block.T - torch.eye(GROUP)).abs().max() < 1e-5
    assert torch.equal(order.sort().values, torch.arange(WIDTH))


def test_row_rule_swaps_the_number_of_the_row() -> None:
    x = torch.zeros(3, 4)
    x[1, 2] = 8.0
    by_column = greedy_rotation(x, 4, _generator(), num_steps=1)
    by_row = greedy_rotation(x, 4, _generator(), num_steps=1, rule="row")
    base = base_rotation(4, _generator())
    for rotation, index in ((by_column, 2), (by_row, 1)):
        order = torch.arange(4)
        order[0], order[index] = index, 0
        swapped = base[order][:, order]
        turned = x @ swapped
        taken = swapped if turned.max() - turned.min() < 8 else torch.eye(4)
        assert_close(rotation, taken)


def test_strides_of_nine_deal_sorted_channels_to_groups() -> None:
    x = torch.arange(18.0).flip(0)[None].repeat(2, 1)  # channel 0 has the largest range
    x[1] = 0
    assert deal_channels(x, 2).tolist() == [c + k for c in range(9) for k in (0, 9)]


def test_zigzag_deals_to_and_fro() -> None:
    x = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2, 1], [0.0] * 9])
    assert deal_channels(x, 3, "zigzag").tolist() == [0, 5, 6, 1, 4, 7, 2, 3, 8]


def test_block_is_the_largest_divisor_up_to_128() -> None:
    assert [block_size(width) for width in (64, 256, 192, 1152, 97)] == [64, 128, 96, 128, 97]


def test_smoothing_takes_half_of_the_range_in_the_log_and_spares_zero_channels() -> None:
    weight = torch.tensor([[4.0, 1.0, 0.0, 2.0], [-1.0, 0.5, 0.0, -2.0]])
    scale = smoothing_scale(weight, torch.tensor([1.0, 4.0, 3.0, 0.0]))
    assert_close(scale, torch.tensor([2.0, 0.5, 1.0, 1.0]))


def _decibels(x: Tensor, bits: int) -> float:
    """Energy of the mild part over that of the noise of symmetric per-token quantization."""
    step = x.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    noise = (x / step).round() * step - x
    return float(10 * torch.log10(_mild().square().sum() / noise.square().sum()))


@pytest.mark.slow
def test_on_a_salient_layer_the_dual_transformation_beats_random_and_single_rotations() -> None:
    """The order of notes 4.3 at A6 and A8, and its figures within a decibel."""
    x = _salient()
    random = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=_generator(5))).Q
    first, order, second = dual_transformation(x, GROUP, _generator(1))
    single = (x.view(-1, GROUP) @ first).view(x.shape)
    dual = Dual(first, order, second)(x)
    for bits, expected in ((6, (0.0, 11.3, 13.2)), (8, (5.3, 23.5, 25.4))):
        found = tuple(_decibels(y, bits) for y in (x, x @ random, dual))
        assert found[0] < found[1] < found[2]
        assert found == pytest.approx(expected, abs=1.0)
        assert _decibels(single, bits) < found[2]
    assert dual.abs().max() == pytest.approx(13.0, abs=1.0)


def test_a_true_hadamard_matrix_beats_them_all_on_that_layer() -> None:
    """Two constant channels are two of 1152 equal terms; the notes had a random stand-in."""
    signs = torch.randint(0, 2, (WIDTH,), generator=_generator()) * 2 - 1
    assert _decibels(Hadamard(signs)(_salient()), 6) > 16

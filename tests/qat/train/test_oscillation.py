"""Oscillation of weights and use of binary activations: golden values and plain loops."""

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from binaryvit.ops import sign
from qat.train.oscillation import Oscillation, sign_statistics


def watched(sequence: Sequence[int], momentum: float = 0.5, warmup: int = 0) -> Oscillation:
    """One weight that has had the codes of `sequence`, the first at the start."""
    codes = [torch.tensor([code], dtype=torch.int8) for code in sequence]
    seen = Oscillation(codes[0], momentum)
    for step, code in enumerate(codes[1:]):
        seen.update(code, count_oscillations=step >= warmup)
    return seen


def frequency(*sequence: int, momentum: float = 0.5, warmup: int = 0) -> float:
    """Oscillation frequency after a sequence of codes of one weight."""
    return watched(sequence, momentum, warmup).frequency.item()


def frequency_by_loop(sequence: Sequence[int], momentum: float) -> tuple[float, int]:
    """Frequency and number of flips, from the definition."""
    average, flips, last_direction = 0.0, 0, 0
    for before, after in pairwise(sequence):
        direction = (after > before) - (after < before)
        oscillated = direction != 0 and direction == -last_direction
        average = momentum * oscillated + (1 - momentum) * average
        flips += direction != 0
        last_direction = direction or last_direction
    return average, flips


def statistics_by_loop(channels: list[list[float]], dead_below: float) -> tuple[float, float]:
    """Mean sign entropy and share of dead channels, one channel at a time."""
    entropy = dead = 0.0
    for codes in channels:
        p = sum(code > 0 for code in codes) / len(codes)
        entropy -= sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)
        dead += p < dead_below or p > 1 - dead_below
    return entropy / len(channels), dead / len(channels)


def codes_with_dead_channels(*shape: int) -> Tensor:
    """Random signs; of the last axis, channel 0 is all +1, 1 all -1 and 2 has a single +1."""
    codes = sign(torch.randn(shape))
    codes[..., 0], codes[..., 1], codes[..., 2] = 1, -1, -1
    codes.select(-1, 2).view(-1)[0] = 1
    return codes


def test_sign_entropy_of_a_quarter_is_its_golden_value() -> None:
    codes = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]], [[-1.0, 1.0], [-1.0, -1.0]]])
    entropy, dead = sign_statistics(codes, (2,))
    # Shares 1/4 and 1/2: -(1/4) log2 (1/4) - (3/4) log2 (3/4) = 0.8112781 bits, and 1 bit.
    assert entropy.item() == pytest.approx((0.8112781 + 1) / 2, abs=1e-6)
    assert dead == 0


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_channels_of_one_sign_are_dead_and_have_no_entropy(value: float) -> None:
    for trailing, shape in (((3,), (2, 5, 3)), ((3, 1, 4), (2, 3, 5, 4))):
        entropy, dead = sign_statistics(torch.full(shape, value), trailing)
        assert entropy == 0
        assert dead == 1


def test_sign_statistics_of_linear_inputs_equal_a_plain_loop() -> None:
    codes = codes_with_dead_channels(4, 50, 6)
    channels = [codes[:, :, c].flatten().tolist() for c in range(6)]
    expected = statistics_by_loop(channels, 0.02)
    assert expected[1] == 0.5  # all +1, all -1 and 1 of 200
    measured = [float(value) for value in sign_statistics(codes, (6,))]
    assert measured == pytest.approx(expected, abs=1e-6)


def test_sign_statistics_of_pooled_inputs_equal_a_plain_loop() -> None:
    codes = codes_with_dead_channels(60, 6)
    channels = [codes[:, c].tolist() for c in range(6)]
    measured = [float(value) for value in sign_statistics(codes, (6,))]
    assert measured == pytest.approx(statistics_by_loop(channels, 0.02), abs=1e-6)


def test_sign_statistics_of_attention_operands_are_over_heads_and_their_channels() -> None:
    codes = codes_with_dead_channels(4, 3, 25, 5)
    codes[:, 1] = 1  # a whole head without information
    channels = [codes[:, h, :, c].flatten().tolist() for h in range(3) for c in range(5)]
    expected = statistics_by_loop(channels, 0.02)
    assert 0 < expected[1] < 1
    measured = [float(value) for value in sign_statistics(codes, (3, 1, 5))]
    assert measured == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("num_positive", "dead"), [(0, 1), (1, 1), (2, 0), (6, 0), (7, 1), (8, 1)])
def test_a_channel_dies_below_the_threshold_and_not_on_it(num_positive: int, dead: int) -> None:
    codes = torch.full((2, 4, 1), -1.0)
    codes.view(-1)[:num_positive] = 1
    assert sign_statistics(codes, (1,), dead_below=0.25)[1] == dead


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0, 0, 0), 0.0),
        ((0, 1), 0.0),  # the first flip undoes nothing
        ((0, 1, 2, 3), 0.0),  # drifts
        ((0, 1, 0), 0.5),  # up, then down
        ((0, -1, 0), 0.5),
        ((0, 1, 3, 2), 0.5),  # the direction counts, not the size
        ((0, 1, 1, 0), 0.5),  # the direction is that of the last flip, however long ago
        ((0, 1, 0, 0), 0.25),  # 0.5 * 0 + 0.5 * 0.5
        ((0, 1, 0, 1), 0.75),  # 0.5 * 1 + 0.5 * 0.5
        ((0, 1, 0, -1), 0.25),  # goes on down
        ((7, -8, 7), 0.5),  # both ends of four bits
        ((-128, 127, -128), 0.5),  # and of eight, whose difference is no int8
    ],
)
def test_flip_oscillates_only_if_it_reverses_the_flip_before(
    codes: tuple[int, ...], expected: float
) -> None:
    assert frequency(*codes) == expected


def test_every_flip_of_a_binary_weight_after_the_first_oscillates() -> None:
    # Flips at steps 1, 3, 4 and 6; the first does not oscillate.
    codes = (1, -1, -1, 1, -1, -1, 1)
    average = 0.0
    for oscillated in (0, 0, 1, 1, 0, 1):
        average = 0.1 * oscillated + 0.9 * average
    assert frequency(*codes, momentum=0.1) == pytest.approx(average)


def test_unsigned_codes_that_fall_are_flips_downward() -> None:
    seen = Oscillation(torch.tensor([0], dtype=torch.uint8), 0.5)
    for code in (255, 1, 200):
        seen.update(torch.tensor([code], dtype=torch.uint8))
    assert seen.frequency == 0.75  # two reversals in a row
    assert seen.take_flips() == (3, 3)


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=30), st.floats(0.01, 1))
def test_frequency_and_flips_equal_a_plain_loop(codes: list[int], momentum: float) -> None:
    average, flips = frequency_by_loop(codes, momentum)
    seen = watched(codes, momentum)
    assert seen.frequency.item() == pytest.approx(average, abs=1e-6)
    assert seen.take_flips() == (flips, len(codes) - 1)


def test_weights_are_watched_one_by_one() -> None:
    steps = torch.randint(-2, 2, (20, 3, 4), dtype=torch.int8)
    seen = Oscillation(steps[0], 0.2)
    for codes in steps[1:]:
        seen.update(codes)
    expected = [frequency_by_loop(column.tolist(), 0.2) for column in steps.flatten(1).T]
    found = seen.frequency.flatten().tolist()
    assert found == pytest.approx([average for average, _ in expected], abs=1e-6)
    assert seen.take_flips() == (sum(flips for _, flips in expected), 19 * 12)


def test_one_oscillation_stays_above_the_threshold_for_68_further_steps() -> None:
    # f = 0.01 * 0.99^k: 0.99^68 = 0.5049 and 0.99^69 = 0.4998, and the threshold is 0.005.
    seen = watched((0, 1, 0), momentum=0.01)
    resting = torch.tensor([0], dtype=torch.int8)
    for _ in range(68):
        seen.update(resting)
    assert seen.oscillating().tolist() == [True]
    seen.update(resting)
    assert seen.oscillating().tolist() == [False]


def test_threshold_is_exceeded_not_met() -> None:
    seen = watched((0, 1, 0))
    assert seen.oscillating(0.5).tolist() == [False]
    assert seen.oscillating(0.499).tolist() == [True]


def test_momentum_is_a_hundredth_unless_stated() -> None:
    seen = Oscillation(torch.tensor([0]))
    for code in (1, 0):
        seen.update(torch.tensor([code]))
    assert seen.frequency.item() == pytest.approx(0.01)


def test_weight_that_comes_back_has_flips_but_is_not_changed() -> None:
    start = torch.tensor([0, 0, 0], dtype=torch.int8)
    seen = Oscillation(start)
    seen.update(torch.tensor([1, 1, 0], dtype=torch.int8))
    assert seen.changed().tolist() == [True, True, False]
    seen.update(torch.tensor([0, 2, 0], dtype=torch.int8))
    assert seen.changed().tolist() == [False, True, False]
    assert seen.take_flips() == (4, 6)


def test_taking_flips_starts_the_count_anew_and_keeps_the_rest() -> None:
    seen = watched((0, 1, 0))
    assert seen.take_flips() == (2, 2)
    assert seen.take_flips() == (0, 0)
    seen.update(torch.tensor([0], dtype=torch.int8))
    seen.update(torch.tensor([1], dtype=torch.int8))
    assert seen.take_flips() == (1, 2)
    assert seen.frequency == 0.625  # 0.5, 0.25, and again a reversal
    assert seen.changed().tolist() == [True]


def test_warm_up_moves_no_frequency_but_counts_flips_and_keeps_directions() -> None:
    assert frequency(0, 1, 0, 1, 0, warmup=4) == 0
    assert watched((0, 1, 0, 1, 0), warmup=4).take_flips() == (4, 4)
    # The flip after the warm-up undoes the last one of it, or goes on.
    assert frequency(0, 1, 2, 1, warmup=2) == 0.5
    assert frequency(0, 1, 2, 3, warmup=2) == 0.0


def test_codes_given_are_neither_kept_nor_changed() -> None:
    codes = torch.tensor([0, 1], dtype=torch.int8)
    seen = Oscillation(codes)
    codes += 1
    assert seen.changed().tolist() == [False, False]
    seen.update(codes)
    codes -= 1  # such as an optimizer that writes in place
    assert codes.tolist() == [0, 1]
    assert seen.changed().tolist() == [True, True]


@pytest.mark.parametrize("taken", [0, 3, 9])
def test_statistics_continue_from_a_saved_state_as_if_never_stopped(taken: int) -> None:
    steps = torch.randint(-2, 2, (20, 5), dtype=torch.int8)

    def run(seen: Oscillation, first: int, last: int) -> Oscillation:
        for step in range(first, last):
            seen.update(steps[step], count_oscillations=step > 2)
            if step == taken:
                seen.take_flips()
        return seen

    whole = run(Oscillation(steps[0], 0.3), 1, 20)
    file = io.BytesIO()
    torch.save(run(Oscillation(steps[0], 0.3), 1, 10).state_dict(), file)
    file.seek(0)
    resumed = run(Oscillation.from_state(torch.load(file, weights_only=True)), 10, 20)
    expected: dict[str, Any] = whole.state_dict()
    found = resumed.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name
    assert resumed.take_flips() == whole.take_flips()

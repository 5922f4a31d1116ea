import math

import pytest
import torch
from torch import Tensor

from binaryvit.ops import sign
from qat.oscillation import sign_statistics


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

"""The noise schedule."""

import pytest
import torch
from torch.testing import assert_close

from qat.diffusion import NoiseSchedule


def test_signal_is_the_product_of_what_each_step_leaves() -> None:
    schedule = NoiseSchedule(3, 0.1, 0.3)
    expected = torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], dtype=torch.float64)
    assert_close(schedule.signal(), expected)


def test_noisy_image_keeps_the_variance_and_mixes_by_time() -> None:
    schedule = NoiseSchedule(3, 0.1, 0.3)
    images, noise = torch.ones(2, 1, 1, 1), torch.full((2, 1, 1, 1), 2.0)
    found = schedule.add_noise(images, noise, torch.tensor([0, 2])).flatten()
    left = torch.tensor([0.9, 0.504])
    assert_close(found, left.sqrt() + 2 * (1 - left).sqrt())


def test_default_ends_in_almost_pure_noise() -> None:
    assert NoiseSchedule().signal()[-1] < 5e-5


def test_spread_steps_lie_in_the_middle_of_equal_parts() -> None:
    assert NoiseSchedule().spread(4).tolist() == [125, 375, 625, 875]


@pytest.mark.parametrize("arguments", [(0,), (10, 0.0, 0.1), (10, 0.2, 0.1), (10, 0.1, 1.0)])
def test_impossible_schedule_is_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="NoiseSchedule needs"):
        NoiseSchedule(*arguments)  # type: ignore[arg-type]

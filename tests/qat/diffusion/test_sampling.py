"""Samplers, on data whose best noise prediction has a closed form."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from qat.diffusion import NoiseSchedule
from qat.diffusion.sampling import Predict, ddim, ddpm, guided
from tests.qat.diffusion.common import inputs, tiny_dit

SCHEDULE = NoiseSchedule()
MEAN, STD = 0.2, 0.1


def _oracle(mean: float, std: float) -> Predict:
    """The expected noise in x_t where every pixel is normal: its posterior mean."""
    signal = SCHEDULE.signal().float()

    def predict(x: Tensor, times: Tensor) -> Tensor:
        left = signal[times][:, None, None, None]
        variance = left * std**2 + 1 - left
        return (1 - left).sqrt() * (x - left.sqrt() * mean) / variance

    return predict


def _noise(count: int = 64) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_ddim_with_the_true_noise_returns_the_image_at_any_number_of_steps() -> None:
    """All mass on one image: eps follows from x_t, and each step lands on its path."""
    image = torch.linspace(-0.9, 0.9, 64).view(1, 1, 8, 8)
    signal = SCHEDULE.signal().float()

    def predict(x: Tensor, times: Tensor) -> Tensor:
        left = signal[times][:, None, None, None]
        return (x - left.sqrt() * image) / (1 - left).sqrt()

    for steps in (1, 7, 50):
        found = ddim(predict, _noise(2), SCHEDULE, steps)
        assert_close(found, image.expand(2, -1, -1, -1), rtol=1e-4, atol=1e-4)


def test_samplers_draw_from_the_distribution_of_the_data() -> None:
    oracle = _oracle(MEAN, STD)
    for samples in (
        ddim(oracle, _noise(), SCHEDULE, 1000),
        ddpm(oracle, _noise(), SCHEDULE, torch.Generator().manual_seed(1)),
    ):
        assert float(samples.mean()) == pytest.approx(MEAN, abs=0.01)
        assert float(samples.std()) == pytest.approx(STD, rel=0.06)


def test_ddim_is_a_function_of_its_noise_and_ddpm_of_its_generator_too() -> None:
    oracle, noise = _oracle(MEAN, STD), _noise(4)
    assert torch.equal(ddim(oracle, noise, SCHEDULE, 5), ddim(oracle, noise, SCHEDULE, 5))
    short = NoiseSchedule(20, 0.01, 0.3)

    def predict(x: Tensor, times: Tensor) -> Tensor:
        return 0.5 * x

    first, again, other = (
        ddpm(predict, noise, short, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_predicted_image_is_clamped_to_the_range_of_pixels() -> None:
    found = ddim(lambda x, times: -5 * x, _noise(4), SCHEDULE, 3)
    assert found.abs().max() <= 1


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_that_the_schedule_does_not_have_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="num_steps must be 1 to 1000"):
        ddim(_oracle(MEAN, STD), _noise(1), SCHEDULE, steps)


def test_guidance_moves_from_no_class_beyond_the_class() -> None:
    model = tiny_dit()
    x, times, labels = inputs()
    own, none = model(x, times, labels), model(x, times, torch.full_like(labels, 5))
    found = guided(model, labels, 3.0)(x, times)
    assert_close(found, none + 3 * (own - none), rtol=1e-4, atol=1e-4)
    assert torch.equal(guided(model, labels)(x, times), own)


def test_guidance_without_an_absent_class_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a model with null_class"):
        guided(tiny_dit(null_class=False), torch.tensor([0]), 2.0)

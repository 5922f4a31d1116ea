"""Measures: errors by time, Fréchet distances in closed form, the judge."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from qat.diffusion import NoiseSchedule
from qat.diffusion.judge import judge
from qat.diffusion.measure import frechet, in_parts, judged, predict

SCHEDULE = NoiseSchedule()


class _Scaled(nn.Module):
    """Predicts half of what it is shown."""

    def forward(self, x: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return 0.5 * x


class _Zero(nn.Module):
    """Predicts zero, and remembers the times it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[int] = []

    def forward(self, x: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.times += times.unique().tolist()
        return torch.zeros_like(x)


def _predict(model: nn.Module) -> tuple:
    images, labels = torch.ones(70, 1, 8, 8), torch.arange(70) % 5
    return predict(model, images, labels, SCHEDULE, 4, torch.Generator().manual_seed(0))


def test_noise_is_the_same_for_every_model_and_errors_are_mean_squares() -> None:
    model = _Zero()
    zero, scaled = _predict(model), _predict(_Scaled())
    assert torch.equal(zero.noise, scaled.noise)
    assert sorted(set(model.times)) == [125, 375, 625, 875]
    assert_close(zero.errors(), zero.noise.square().mean((1, 2, 3, 4)))
    left = SCHEDULE.signal().float()[zero.times].view(-1, 1, 1, 1, 1)
    noisy = left.sqrt() + (1 - left).sqrt() * zero.noise
    assert_close(scaled.gaps(zero), (0.5 * noisy).square().mean((1, 2, 3, 4)))


def test_parts_make_the_same_samples_as_the_whole() -> None:
    noise, labels = torch.randn(300, 1, 2, 2), torch.arange(300)
    found = in_parts(lambda x, y: x + y[:, None, None, None], noise, labels)
    assert torch.equal(found, noise + labels[:, None, None, None])


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    x = torch.randn(200, 6)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_a_shift_and_of_a_scale_by_hand() -> None:
    """|m|^2 for a shift; sum of (s1 - s2)^2 for covariances that share their axes."""
    x = torch.randn(500, 4)
    assert frechet(x, x + torch.tensor([3.0, 4.0, 0.0, 0.0])) == pytest.approx(25, rel=1e-5)
    centred = x - x.mean(0)
    deviations = torch.cov(centred.double().T).trace()
    assert frechet(centred, 3 * centred) == pytest.approx(float(4 * deviations), rel=1e-5)


def test_judge_sees_classes_and_features_of_one_pass() -> None:
    model = judge(img_size=8, width=4, num_features=6)
    images = torch.randn(5, 1, 8, 8)
    verdict = judged(model, images)
    assert verdict.features.shape == (5, 6)
    assert torch.equal(verdict.classes, model(images).argmax(1))

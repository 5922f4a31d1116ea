"""The search finds minima, alone from losses."""

import pytest
import torch

from qat.tta import cma


@pytest.mark.parametrize("stretch", [1.0, 30.0])
def test_search_finds_the_minimum_of_a_stretched_bowl(stretch: float) -> None:
    size = 12
    target = torch.linspace(-1, 1, size)
    scales = torch.linspace(1, stretch, size)
    generator = torch.Generator().manual_seed(0)
    state = cma.start(size, 0.5, torch.zeros(()))
    first = float((scales * target).square().sum())
    for _ in range(150):
        draws = cma.sample(state, 16, generator)
        points = cma.candidates(state, draws)
        state = cma.update(state, draws, (scales * (points - target)).square().sum(1))
    assert float((scales * (state["mean"] - target)).square().sum()) < 1e-3 * first
    assert float(state["step"]) < 0.5


def test_mean_moves_to_the_weighted_mean_of_the_best_half() -> None:
    state = cma.start(2, 1.0, torch.zeros(()))
    draws = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-5.0, 0.0], [0.0, -5.0]])
    new = cma.update(state, draws, torch.tensor([0.0, 1.0, 2.0, 3.0]))
    weights = torch.tensor([2.5, 2.5]).log() - torch.tensor([1.0, 2.0]).log()
    torch.testing.assert_close(new["mean"], weights / weights.sum())
    assert not state["mean"].any()

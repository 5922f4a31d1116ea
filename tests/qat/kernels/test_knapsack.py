"""The multiple-choice knapsack against every choice, and every instruction set against NumPy."""

from itertools import product

import numpy as np
import pytest

from qat.kernels import instruction_sets
from qat.kernels.knapsack import knapsack

Tables = tuple[np.ndarray, np.ndarray, np.ndarray]


def tables(seed: int, groups: int, options: int, heaviest: int) -> Tables:
    """Random weights that rise from 0, losses of few values, so that some tie, and costs."""
    rng = np.random.default_rng(seed)
    weights = np.sort(rng.integers(0, heaviest + 1, (groups, options)))
    weights[:, 0] = 0
    losses = rng.integers(0, 9, (groups, options)).astype(float)
    losses[rng.random(groups) < 0.5, -1] = np.inf  # a group with one option less
    return weights, losses, rng.uniform(0, 1, (groups, options))


@pytest.mark.parametrize("seed", range(3))
def test_loss_at_every_weight_is_the_least_of_all_choices(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWBIT_KERNELS", "numpy")
    given = weights, losses, costs = tables(seed, 4, 4, 20)
    loss, cost, choice = knapsack(*given)
    every = list(product(range(4), repeat=4))
    totals = [np.array([table[range(4), picks].sum() for picks in every]) for table in given]
    for cell, least in enumerate(loss):
        assert least == totals[1][totals[0] == cell].min(initial=np.inf)
        if np.isfinite(least):
            at, picks = cell, []
            for group in (3, 2, 1, 0):
                picks.append(choice[group, at])
                at -= weights[group, picks[-1]]
            assert at == 0
            assert losses[range(4), picks[::-1]].sum() == least
            assert costs[range(4), picks[::-1]].sum() == pytest.approx(cost[cell])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 5), (5, 7, 100), (20, 30, 15), (3, 2, 4000)])
@pytest.mark.parametrize("name", instruction_sets())
def test_every_instruction_set_gives_the_losses_costs_and_choices_of_numpy(
    name: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, found = tables(0, *shape), {}
    for chosen in ("numpy", name):
        monkeypatch.setenv("LOWBIT_KERNELS", chosen)
        found[chosen] = knapsack(*given)
    reached = np.isfinite(found["numpy"][0])
    for expected, got in zip(found["numpy"], found[name], strict=True):
        np.testing.assert_array_equal(got[..., reached], expected[..., reached])

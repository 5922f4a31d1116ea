"""The frontier against brute force, its hull, budgets, the knee, and the baselines."""

from itertools import product

import numpy as np
import pytest

import qat
from qat.cost.count import cost
from qat.quantizers import LSQ
from qat.quantizers.slots import slot_of
from qat.search import pmq
from qat.search.allocate import Component, Frontier, Option, best, frontier, hull, totals
from qat.search.baselines import at_random, greedy
from tests.conftest import make_tiny_vit
from tests.qat.common import plan


def components(seed: int, count: int, widths: tuple[int, ...] = (2, 3, 4)) -> list[Component]:
    """Random losses that fall fourfold with each bit; costs are multiples of eight."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        macs, left, right = int(rng.integers(1, 9)) * 8, *rng.uniform(0.01, 1, 2)
        options = [
            Option((a, b), float(macs * a * b), left * 4.0**-a + right * 4.0**-b)
            for a, b in product(widths, widths)
        ]
        found.append(Component.of(str(i), options))
    return found


def brute_force(parts: list[Component]) -> list[tuple[float, float]]:
    """Every choice, without those that another one beats."""
    costs, losses = np.zeros(1), np.zeros(1)
    for part in parts:
        costs = (costs[:, None] + [o.cost for o in part.options]).ravel()
        losses = (losses[:, None] + [o.loss for o in part.options]).ravel()
    order = np.lexsort((losses, costs))
    kept, least = [], np.inf
    for i in order:
        if losses[i] < least * (1 - 1e-12):
            kept.append((costs[i], losses[i]))
            least = losses[i]
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_frontier_equals_brute_force_over_all_choices(seed: int) -> None:
    parts = components(seed, 4)
    found = frontier(parts)
    expected = brute_force(parts)
    np.testing.assert_array_equal(found.costs, [c for c, _ in expected])
    np.testing.assert_allclose(found.losses, [loss for _, loss in expected], rtol=1e-12)


@pytest.mark.parametrize("measure", ["bops", "size_bytes"])
def test_frontier_of_a_model_of_two_blocks_equals_brute_force(measure: pmq.Measure) -> None:
    model = make_tiny_vit()
    qat.convert_(model, plan(8), LSQ)
    rng = np.random.default_rng(0)
    table = {}
    for path, quantizer in qat.quantizers.quantizers(model):
        scale = rng.uniform(0.01, 1)
        table[slot_of(path, quantizer)] = {bits: scale * 4.0**-bits for bits in (2, 4)}
    costs = cost(model)
    price = pmq.cost_of(measure, None)
    space = pmq.Space((2, 4), (2, 4), "equal")
    task = pmq.problem(costs, table, space, measure, price)
    assert len(task.components) == 12
    found = frontier(list(task.components), cells=2**20)
    expected = brute_force(list(task.components))
    np.testing.assert_allclose(found.costs, [c for c, _ in expected])
    np.testing.assert_allclose(found.losses, [loss for _, loss in expected], rtol=1e-12)


def test_picks_of_every_point_add_up_to_its_totals() -> None:
    parts = components(7, 5)
    found = frontier(parts)
    for point, sums in enumerate(zip(found.costs, found.losses, strict=True)):
        np.testing.assert_allclose(totals(parts, found.picks(point)), sums)


@pytest.mark.parametrize("cells", [50, 400])
def test_rounded_frontier_states_exact_totals_and_is_nowhere_worse_than_the_hull(
    cells: int,
) -> None:
    parts = components(3, 12)
    rough, exact, edge = frontier(parts, cells), frontier(parts), hull(parts)
    for point, (cost_, loss) in enumerate(zip(rough.costs, rough.losses, strict=True)):
        np.testing.assert_allclose(totals(parts, rough.picks(point)), (cost_, loss))
        assert loss >= exact.losses[exact.within(cost_)] * (1 - 1e-12)
    for cost_, loss in zip(edge.costs, edge.losses, strict=True):
        assert rough.losses[rough.within(cost_)] <= loss * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_hull_points_lie_on_the_frontier_and_their_slopes_rise(seed: int) -> None:
    parts = components(seed, 6)
    found, edge = frontier(parts), hull(parts)
    points = {round(c): loss for c, loss in zip(found.costs, found.losses, strict=True)}
    for cost_, loss in zip(edge.costs, edge.losses, strict=True):
        assert points[round(cost_)] == pytest.approx(loss, rel=1e-12)
    slopes = np.diff(edge.losses) / np.diff(edge.costs)
    assert (np.diff(slopes) >= -1e-12).all() and (slopes < 0).all()


def test_lagrangian_optimum_of_any_multiplier_is_a_hull_point() -> None:
    parts = components(11, 6)
    edge = hull(parts)
    for multiplier in np.geomspace(1e-7, 1e-2, 40):
        least = sum(min(o.loss + multiplier * o.cost for o in part.options) for part in parts)
        assert (edge.losses + multiplier * edge.costs).min() == pytest.approx(least, rel=1e-9)


def test_options_that_another_one_beats_are_dropped() -> None:
    options = [Option((4, 4), 16.0, 0.1), Option((2, 8), 16.0, 0.3), Option((3, 6), 18.0, 0.2)]
    options.append(Option((8, 8), 64.0, 0.01))
    assert [o.bits for o in Component.of("x", options).options] == [(4, 4), (8, 8)]


def test_best_for_a_budget_is_the_dearest_point_within_it() -> None:
    parts = components(5, 6)
    found = frontier(parts)
    for budget in (found.costs[0], found.costs.mean(), found.costs[-1] * 2):
        spent, loss = totals(parts, best(parts, budget))
        assert spent <= budget
        assert loss == pytest.approx(found.losses[found.costs <= budget].min(), rel=1e-12)


@pytest.mark.parametrize("allocate", [best, greedy, at_random])
def test_budget_below_the_cheapest_choice_states_the_reachable_range(allocate: object) -> None:
    parts = [Component.of("a", [Option((2, 2), 400.0, 1.0), Option((8, 8), 6400.0, 0.0)])] * 2
    with pytest.raises(ValueError, match=r"399 cannot be met.*reach 800 to 12,800"):
        allocate(parts, 399.0, 0)  # type: ignore[operator]


def test_knee_is_the_point_farthest_from_the_chord() -> None:
    # On axes from 0 to 1, cost and log-loss: (0, 1), (.25, .25), (.5, .2), (1, 0).
    losses = 10.0 ** np.array([4.0, 1.0, 0.8, 0.0])
    found = Frontier(np.array([0.0, 25.0, 50.0, 100.0]), losses, lambda point: ())
    assert found.knee() == 1


@pytest.mark.parametrize("seed", range(5))
def test_baselines_stay_within_the_budget_and_never_beat_the_frontier(seed: int) -> None:
    parts = components(seed, 8)
    found = frontier(parts)
    budget = float(found.costs[0] + found.costs[-1]) / 3
    least = found.losses[found.within(budget)]
    spent, greedy_loss = totals(parts, greedy(parts, budget))
    assert spent <= budget and greedy_loss >= least * (1 - 1e-12)
    drawn = [totals(parts, at_random(parts, budget, s)) for s in range(8)]
    assert all(c <= budget and loss >= least * (1 - 1e-12) for c, loss in drawn)
    assert greedy_loss < np.mean([loss for _, loss in drawn])
    assert len({loss for _, loss in drawn}) > 1


def test_random_allocation_repeats_with_its_seed() -> None:
    parts = components(1, 8)
    assert at_random(parts, 5000.0, 3) == at_random(parts, 5000.0, 3)

"""Bits for every component under a budget: the exact Pareto frontier of a separable problem.

    minimise  sum_i loss_i(o_i)   subject to   sum_i cost_i(o_i) <= budget,   o_i an option of i

The objective is separable, so the frontier is built component by component: the least loss at every
total cost, from the least loss without the component and each of its options. Costs are counted in
a unit. Where all costs are multiples of one that gives few enough cells, the frontier is exact;
else they are rounded to a cell, the hull's points are added, and the totals of what is found are
computed anew, unrounded.

The Lagrangian hull, min over o of loss + lambda * cost for every lambda, is a subset of the
frontier's points and independent of the cells; it bounds the frontier from below.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qat.cost.count import Width
from qat.kernels.knapsack import knapsack

CELLS = 2**14
"""Most cells of a frontier: resolution of the cost."""


@dataclass(frozen=True)
class Option:
    """One choice for a component.

    Attributes:
        bits: Widths of its two operands.
        cost: In units of the budget.
        loss: What it adds to the loss.
    """

    bits: tuple[Width, Width]
    cost: float
    loss: float


@dataclass(frozen=True)
class Component:
    """A matrix product, and its options by rising cost and falling loss.

    Attributes:
        name: Its name, as in the table of costs.
        options: None of them as costly as another and no better.
    """

    name: str
    options: tuple[Option, ...]

    @staticmethod
    def of(name: str, options: Sequence[Option]) -> "Component":
        """The component, without the options that another one beats."""
        kept: list[Option] = []
        for option in sorted(options, key=lambda o: (o.cost, o.loss)):
            if not kept or option.loss < kept[-1].loss:
                kept.append(option)
        return Component(name, tuple(kept))


Picks = tuple[int, ...]
"""Index of the option of each component."""
Allocate = Callable[[Sequence[Component], float, int], Picks]
"""From components, a budget that can be met and a seed to options within the budget."""


@dataclass(frozen=True)
class Frontier:
    """Points that no other beats, by rising cost and falling loss.

    Attributes:
        costs: Total cost of each point.
        losses: Total loss of each point.
        picks: From the index of a point to the option of each component.
    """

    costs: np.ndarray
    losses: np.ndarray
    picks: Callable[[int], Picks]

    def within(self, budget: float) -> int:
        """Index of the best point whose cost is within a budget.

        Raises:
            ValueError: If there is none; states the reachable range.
        """
        check_budget(budget, self.costs[0], self.costs[-1])
        return int(np.searchsorted(self.costs, budget, side="right")) - 1

    def knee(self) -> int:
        """Index of the point farthest from the chord between the two ends.

        Loss is compared by its logarithm, of which bits are a linear function: each bit divides
        the squared error by four.
        """
        if len(self.costs) < 3:
            return len(self.costs) - 1
        cost = (self.costs - self.costs[0]) / (self.costs[-1] - self.costs[0])
        loss = np.log(np.maximum(self.losses, 1e-30))
        loss = (loss - loss[-1]) / (loss[0] - loss[-1])
        return int(np.argmax(1 - cost - loss))


def check_budget(budget: float, least: float, most: float) -> None:
    """Refuse a budget that no choice of options meets.

    Raises:
        ValueError: If it is below what the cheapest options cost.
    """
    if not budget >= least:
        raise ValueError(
            f"the budget {budget:,.6g} cannot be met: the allowed widths reach {least:,.6g} to "
            f"{most:,.6g}; raise it, or allow narrower widths in search.weights and "
            "search.activations"
        )


def frontier(components: Sequence[Component], cells: int = CELLS) -> Frontier:
    """The Pareto frontier of all choices.

    Args:
        components: At least one.
        cells: Most cells of the cost; more are slower and, where costs are rounded, finer.
    """
    costs, losses = _tables(components)
    steps, exact = _in_units(costs, cells)
    least, spent, choices = knapsack(steps, losses, costs)
    ends = np.flatnonzero(_falling(least))

    def picks(end: int) -> Picks:
        cell, found = ends[end], []
        for choice, step in zip(choices[::-1], steps[::-1], strict=True):
            found.append(int(choice[cell]))
            cell -= step[found[-1]]
        return tuple(found[::-1])

    found = Frontier(spent[ends], least[ends], picks)
    return found if exact else _united(found, hull(components))  # rounding may lose its points


def hull(components: Sequence[Component]) -> Frontier:
    """The points of the frontier that minimise loss + lambda * cost for some lambda."""
    costs, losses = _tables(components)
    moves = sorted(
        (slope, i, option)
        for i, component in enumerate(components)
        for slope, option in _moves(component.options)
    )
    picks = np.zeros((1 + len(moves), len(components)), dtype=np.int64)
    for point, (_, i, option) in enumerate(moves, 1):
        picks[point, i] = option
    np.maximum.accumulate(picks, out=picks)
    chosen = np.arange(len(components))[:, None], picks.T
    return Frontier(
        costs[chosen].sum(0), losses[chosen].sum(0), lambda point: tuple(picks[point].tolist())
    )


def best(components: Sequence[Component], budget: float, seed: int = 0) -> Picks:
    """The point of the frontier for a budget."""
    found = frontier(components)
    return found.picks(found.within(budget))


def totals(components: Sequence[Component], picks: Sequence[int]) -> tuple[float, float]:
    """Total cost and total loss of a choice."""
    chosen = [c.options[pick] for c, pick in zip(components, picks, strict=True)]
    return sum(o.cost for o in chosen), sum(o.loss for o in chosen)


def _tables(components: Sequence[Component]) -> tuple[np.ndarray, np.ndarray]:
    """Costs and losses (components, options); the last cost and no finite loss beyond the last."""
    shape = len(components), max(len(component.options) for component in components)
    costs, losses = np.empty(shape), np.full(shape, np.inf)
    for i, component in enumerate(components):
        costs[i] = component.options[-1].cost
        count = len(component.options)
        costs[i, :count] = [option.cost for option in component.options]
        losses[i, :count] = [option.loss for option in component.options]
    return costs, losses


def _in_units(costs: np.ndarray, cells: int) -> tuple[np.ndarray, bool]:
    """Costs above the cheapest option of each component, in whole units; True if exactly so."""
    above = costs - costs[:, :1]
    unit, exact = max(above[:, -1].sum() / cells, np.finfo(float).tiny), False
    if (above == above.round()).all() and above.max() < 2**53:
        common = int(np.gcd.reduce(above.astype(np.int64), axis=None))
        unit, exact = (common, True) if common >= unit else (unit, False)
    return np.rint(above / unit).astype(np.int64), exact


def _moves(options: Sequence[Option]) -> list[tuple[float, int]]:
    """From corner to corner of the lower convex hull: slopes, and the options they lead to."""
    moves = [(-np.inf, 0)]
    for j, option in enumerate(options[1:], 1):
        while (slope := _slope(options[moves[-1][1]], option)) <= moves[-1][0]:
            moves.pop()
        moves.append((slope, j))
    return moves[1:]


def _slope(left: Option, right: Option) -> float:
    return (right.loss - left.loss) / (right.cost - left.cost)


def _falling(losses: np.ndarray) -> np.ndarray:
    """Whether each loss is less than all before it."""
    return losses < np.minimum.accumulate(np.concatenate(([np.inf], losses[:-1])))


def _united(left: Frontier, right: Frontier) -> Frontier:
    """The points of both, without those that another beats."""
    costs = np.concatenate((left.costs, right.costs))
    losses = np.concatenate((left.losses, right.losses))
    order = np.lexsort((losses, costs))
    kept = order[_falling(losses[order])]

    def picks(point: int) -> Picks:
        origin, count = int(kept[point]), len(left.costs)
        return left.picks(origin) if origin < count else right.picks(origin - count)

    return Frontier(costs[kept], losses[kept], picks)

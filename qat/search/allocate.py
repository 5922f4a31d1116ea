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
        picks: For each point, the option of each component.
    """

    costs: np.ndarray
    losses: np.ndarray
    picks: np.ndarray

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
    steps, exact = _in_units(components, cells)
    size = 1 + sum(step[-1] for step in steps)
    best = np.full(size, np.inf)
    best[0] = 0.0
    choices = np.zeros((len(components), size), dtype=np.uint8)
    reach = 1
    for i, (component, step) in enumerate(zip(components, steps, strict=True)):
        found = np.full(size, np.inf)
        for j, (shift, option) in enumerate(zip(step, component.options, strict=True)):
            window = slice(shift, shift + reach)
            candidate = best[:reach] + option.loss
            better = candidate < found[window]
            np.copyto(found[window], candidate, where=better)
            np.copyto(choices[i, window], j, where=better)
        best = found
        reach += step[-1]
    ends = np.flatnonzero(best < np.minimum.accumulate(np.concatenate(([np.inf], best[:-1]))))
    picks = np.zeros((len(ends), len(components)), dtype=np.int64)
    at = ends.copy()
    for i in range(len(components) - 1, -1, -1):
        picks[:, i] = choices[i, at]
        at = at - np.asarray(steps[i])[picks[:, i]]
    if not exact:  # rounding may have lost points that the hull has
        picks = np.concatenate((picks, hull(components).picks))
    return _pareto(components, picks)


def hull(components: Sequence[Component]) -> Frontier:
    """The points of the frontier that minimise loss + lambda * cost for some lambda."""
    moves = []
    for i, component in enumerate(components):
        corner = 0
        options = component.options
        while corner < len(options) - 1:
            slopes = [
                ((options[j].loss - options[corner].loss), (options[j].cost - options[corner].cost))
                for j in range(corner + 1, len(options))
            ]
            ratios = [loss / cost for loss, cost in slopes]
            steepest = min(ratios)
            # Of equally steep ones the farthest, so that slopes rise strictly along the component.
            following = corner + 1 + max(j for j, r in enumerate(ratios) if r == steepest)
            moves.append((steepest, i, following))
            corner = following
    picks = [[0] * len(components)]
    for _, i, option in sorted(moves):
        picks.append([*picks[-1][:i], option, *picks[-1][i + 1 :]])
    return _pareto(components, np.asarray(picks))


def best(components: Sequence[Component], budget: float, seed: int = 0) -> Picks:
    """The point of the frontier for a budget."""
    found = frontier(components)
    return tuple(int(pick) for pick in found.picks[found.within(budget)])


def totals(
    components: Sequence[Component], picks: Sequence[int] | np.ndarray
) -> tuple[float, float]:
    """Total cost and total loss of a choice."""
    chosen = [c.options[int(pick)] for c, pick in zip(components, picks, strict=True)]
    return sum(o.cost for o in chosen), sum(o.loss for o in chosen)


def _in_units(components: Sequence[Component], cells: int) -> tuple[list[list[int]], bool]:
    """Cost of every option above the component's cheapest, in whole units; True if exactly so."""
    above = [np.array([o.cost - c.options[0].cost for o in c.options]) for c in components]
    most = sum(float(costs[-1]) for costs in above)
    unit, exact = max(most / cells, np.finfo(float).tiny), False
    if all((costs == costs.round()).all() and costs.max() < 2**53 for costs in above):
        common = int(np.gcd.reduce(np.concatenate(above).astype(np.int64)))
        unit, exact = (common, True) if common >= unit else (unit, False)
    return [np.rint(costs / unit).astype(np.int64).tolist() for costs in above], exact


def _pareto(components: Sequence[Component], picks: np.ndarray) -> Frontier:
    """Totals of choices, without those that another beats."""
    costs, losses = np.zeros(len(picks)), np.zeros(len(picks))
    for i, component in enumerate(components):
        costs += np.array([o.cost for o in component.options])[picks[:, i]]
        losses += np.array([o.loss for o in component.options])[picks[:, i]]
    order = np.lexsort((losses, costs))
    costs, losses, picks = costs[order], losses[order], picks[order]
    least = np.minimum.accumulate(np.concatenate(([np.inf], losses[:-1])))
    kept = losses < least
    return Frontier(costs[kept], losses[kept], picks[kept])

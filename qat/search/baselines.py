"""Allocations to compare the frontier with: greedy, and at random."""

from collections.abc import Sequence

import numpy as np

from qat.search.allocate import Component, Picks, check_budget


def greedy(components: Sequence[Component], budget: float, seed: int = 0) -> Picks:
    """From the cheapest choice on, take the step that saves the most loss for its cost.

    A step leads to the next option of one component. Steps that no longer fit are passed over.
    """
    picks, left = _cheapest(components, budget)
    while True:
        steps = []
        for i, component in enumerate(components):
            if picks[i] + 1 < len(component.options):
                now, following = component.options[picks[i]], component.options[picks[i] + 1]
                cost = following.cost - now.cost
                if cost <= left:
                    steps.append(((now.loss - following.loss) / cost, -i, cost))
        if not steps:
            return tuple(picks)
        _, i, cost = max(steps)
        picks[-i] += 1
        left -= cost


def at_random(components: Sequence[Component], budget: float, seed: int = 0) -> Picks:
    """From the cheapest choice on, raise components drawn at random while the budget lasts."""
    picks, left = _cheapest(components, budget)
    generator = np.random.default_rng(seed)
    open_ = list(range(len(components)))
    while open_:
        i = int(generator.choice(open_))
        options = components[i].options
        if picks[i] + 1 < len(options):
            cost = options[picks[i] + 1].cost - options[picks[i]].cost
            if cost <= left:
                picks[i] += 1
                left -= cost
                continue
        open_.remove(i)
    return tuple(picks)


def _cheapest(components: Sequence[Component], budget: float) -> tuple[list[int], float]:
    least = sum(c.options[0].cost for c in components)
    check_budget(budget, least, sum(c.options[-1].cost for c in components))
    return [0] * len(components), budget - least

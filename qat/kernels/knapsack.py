"""The multiple-choice knapsack: one option of each group, by dynamic programming."""

import numpy as np
from numpy.typing import NDArray

from qat.kernels.arrays import checked
from qat.kernels.loader import instruction_set, native

Doubles = NDArray[np.float64]
Weights = NDArray[np.int64]
Choices = NDArray[np.uint8]
LANES = 16
"""Cells that the kernel looks at together."""


def knapsack(weights: Weights, losses: Doubles, costs: Doubles) -> tuple[Doubles, Doubles, Choices]:
    """The least loss at every total weight, and how to get there.

    Args:
        weights: (groups, options) in cells, rising from 0; at most 256 options. Where a group has
            fewer, its last weight is repeated.
        losses: What each option adds to the loss; infinite where there is none.
        costs: What each adds to the cost, which is counted and decides nothing.

    Returns:
        Loss and cost at every weight, the loss infinite where no choice weighs so much; and the
        option (groups, cells) by which the groups so far reach a weight, the first of equals.

    Example:
        >>> weights, losses = np.array([[0, 2], [0, 1]]), np.array([[3.0, 0.0], [4.0, 1.0]])
        >>> loss, _, choice = knapsack(weights, losses, losses)
        >>> loss, choice[:, 3]
        (array([7., 4., 4., 1.]), array([0, 1], dtype=uint8))
    """
    cells = 1 + int(weights[:, -1].sum())
    size = -(-cells // LANES) * LANES
    choice = np.zeros((len(weights), size), np.uint8)
    run = _by_numpy if instruction_set() == "numpy" else _by_kernel
    loss, cost = run(weights, losses, costs, choice)
    return loss[:cells], cost[:cells], choice[:, :cells]


def _by_kernel(
    weights: Weights, losses: Doubles, costs: Doubles, choice: Choices
) -> tuple[Doubles, Doubles]:
    margin, size = int(weights.max()), choice.shape[1]
    loss, cost = np.full(margin + size, np.inf), np.zeros(margin + size)
    loss, cost = loss[margin:], cost[margin:]
    loss[0] = 0
    types = {"weights": (weights, np.int64), "losses": (losses, float), "costs": (costs, float)}
    tables = [checked(name, x, dtype, weights.shape) for name, (x, dtype) in types.items()]
    run = native(instruction_set()).run
    run("knapsack", *tables, *weights.shape, size, loss, cost, choice)
    return loss, cost


def _by_numpy(
    weights: Weights, losses: Doubles, costs: Doubles, choice: Choices
) -> tuple[Doubles, Doubles]:
    loss, cost = np.zeros(1), np.zeros(1)
    for *group, chosen in zip(weights, losses, costs, choice, strict=True):
        reach = len(loss)
        least, spent = np.full(reach + group[0][-1], np.inf), np.zeros(reach + group[0][-1])
        for j, (weight, more, dearer) in enumerate(zip(*group, strict=True)):
            cells = slice(weight, weight + reach)
            candidates = loss + more
            better = candidates < least[cells]
            np.copyto(least[cells], candidates, where=better)
            np.copyto(spent[cells], cost + dearer, where=better)
            np.copyto(chosen[cells], j, where=better)
        loss, cost = least, spent
    return loss, cost

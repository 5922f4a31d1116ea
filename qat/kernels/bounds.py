"""Signs of functions of an integer, as comparisons of the integer."""

import numpy as np
from numpy.typing import NDArray

_NEVER = np.iinfo(np.int32).max


def bounds(
    signs: NDArray[np.bool_], grid: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Integers `low` and `high` of each row, so that a sign is set where `v <= low or v >= high`.

    A channel's dot product takes few values, so whatever follows it up to the next sign is a table
    of signs: a scale, a bias, an activation that rises on one side and falls on the other.

    Args:
        signs: The sign of each channel (rows) for each value of the grid (columns).
        grid: The values, increasing.

    Returns:
        `low` and `high`, one of each for a row.

    Raises:
        ValueError: If a row is set in the middle of the grid and not at one of its ends.

    Example:
        >>> bounds(np.array([[True, False, True]]), np.array([-2, 0, 2], np.int32))
        (array([-2], dtype=int32), array([2], dtype=int32))
    """
    size = signs.shape[1]
    below, above = _leading(signs), _leading(signs[:, ::-1])
    if (signs.sum(1) > below + above).any():
        raise ValueError("signs change more than twice over the grid; compute them in floats")
    low = np.where(below > 0, grid[below - 1], -_NEVER)
    high = np.where(above > 0, grid[np.minimum(size - above, size - 1)], _NEVER)
    return low.astype(np.int32), high.astype(np.int32)


def _leading(signs: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many signs are set before the first that is not."""
    return np.where(signs.all(1), signs.shape[1], signs.argmin(1))

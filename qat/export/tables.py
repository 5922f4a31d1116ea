"""A quantizer of attention maps as a table: where codes change, and what they stand for."""

import numpy as np
import torch

from qat.quantizers.companding import Companding


@torch.no_grad()
def bounds_and_levels(quantizer: Companding) -> tuple[np.ndarray, np.ndarray]:
    """Ascending bounds, and levels in the order of codes, both in units of the scale.

    A bound is the smallest float32 number that has the next larger level, found by bisection with
    the quantizer's own arithmetic, so that a look-up gives the very codes.

    Returns:
        Bounds (codes - 1,) and levels (codes,).
    """
    levels = quantizer.levels()
    descends = bool(levels[0] > levels[-1])
    last = quantizer.num_codes - 1

    def rank(patterns: np.ndarray) -> np.ndarray:
        values = torch.from_numpy(patterns.astype(np.int32).view(np.float32))
        codes = quantizer.compress(values).round_().clamp_(0, last).numpy()
        return last - codes if descends else codes

    # Patterns of the numbers from 0 to 1 ascend as the numbers do.
    low = np.full(last, -1, np.int64)
    high = np.full(last, np.float32(1).view(np.int32) + 1, np.int64)
    wanted = np.arange(1, last + 1)
    while (high - low > 1).any():
        middle = (low + high) // 2
        reached = rank(np.clip(middle, 0, None)) >= wanted
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return high.astype(np.int32).view(np.float32), levels.numpy().astype(np.float32)

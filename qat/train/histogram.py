"""Histogram of latent weights, by which the two modes of binary training are seen."""

import torch
from jaxtyping import Float
from torch import Tensor

REACH = 3.0
"""What lies beyond this many mean magnitudes is in no bin."""
BINS = 60


def histogram(weight: Float[Tensor, " out *inner"]) -> Float[Tensor, " bins"]:
    """Counts of w / mean|w|, the mean over each output row, in equal bins from -REACH to REACH.

    Two modes at -1 and +1 are weights that stay away from the boundary between the two signs.

    Args:
        weight: Latent weights.
    """
    w = weight.detach().float().flatten(1)
    size = w.abs().mean(1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    return torch.histc(w / size, BINS, -REACH, REACH)


def centres() -> Float[Tensor, " bins"]:
    """Centres of the bins."""
    return (torch.arange(BINS) + 0.5) * (2 * REACH / BINS) - REACH

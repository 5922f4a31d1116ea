"""The range search of RepQ-ViT, for all scales at once, and the quantiles that it needs."""

import torch
from jaxtyping import Float
from torch import Tensor

from qat.quantizers.observers import Observer, in_parts, scale_of_range, squared_errors
from qat.spec import QuantSpec

OFFICIAL = (0.999, 0.9999, 0.99999)
"""Candidates of RepQ-ViT's code, which is for four bits and more."""
NARROW, NARROW_BITS = (0.9, 0.95, 0.98, 0.99), 3
"""Candidates beside them up to so many bits, where the least error lies."""
BLOCK = 64
"""Neighbours of which a search for the outermost values looks at the outermost one first."""


class PercentileMSE(Observer):
    """The range between two quantiles, of few candidates, whose grid has the least squared error.

    The first batch fixes the candidates, between the quantiles 1 - p and p for each p; the errors
    of all batches choose among them. All scales are searched at once. The range need not contain
    zero. Source: official code of RepQ-ViT (https://github.com/zkkli/RepQ-ViT), which loops.
    Deviation: on three bits and fewer, where the least error lies at ranges that cut off more, as
    much as a tenth of the values at each end is tried too.

    Args:
        spec: Bits, sign and granularity of the operand.
        shape: Its trailing shape.
        fractions: The candidates p; None for those of the width.
        per_token: Divide the error of each token by its energy, so that the few tokens of a vision
            transformer with huge features do not decide the range of all. Not part of RepQ-ViT.
            Has no effect on weights, attention maps and channel-wise scales.
    """

    contains_zero = False
    error: Tensor
    lower: Tensor
    upper: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...],
        fractions: tuple[float, ...] | None = None,
        per_token: bool = False,
    ) -> None:
        super().__init__(spec, shape)
        if fractions is None:
            fractions = (*NARROW, *OFFICIAL) if spec.bits <= NARROW_BITS else OFFICIAL
        if not fractions or not all(0.5 < fraction <= 1 for fraction in fractions):
            raise ValueError(f"PercentileMSE.fractions must be in (0.5, 1], got {fractions}")
        self.fractions = tuple(fractions)
        self.num_features = shape[-1] if per_token and not self.scale_shape else 1
        for name in ("error", "lower", "upper"):
            self._buffer(name, 0.0, len(self.fractions))

    def update(self, groups: Tensor) -> None:
        """Add the error of every candidate on this batch."""
        if not self.count:
            self.upper.copy_(upper_quantiles(groups, self.fractions))
            self.lower.copy_(lower_quantiles(groups, self.fractions))
        grids = [
            scale_of_range(lower, upper, self.spec, contains_zero=False)
            for lower, upper in zip(self.lower, self.upper, strict=True)
        ]
        for part, scratch in in_parts(groups, self.num_features):
            energy = self._energy(part)
            for i, grid in enumerate(grids):
                errors = squared_errors(part, *grid, self.spec, scratch)
                if energy is None:
                    self.error[i] += errors.sum(1)
                else:
                    self.error[i] += (errors.view(-1, self.num_features).sum(1) / energy).sum()

    def _energy(self, part: Tensor) -> Tensor | None:
        """Energy of each token, where tokens are weighted by it."""
        if self.num_features == 1:
            return None
        return part.view(-1, self.num_features).square().sum(1).clamp(min=1e-12)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The candidate of least error, scale by scale."""
        best = self.error.argmin(0, keepdim=True)
        return self.lower.gather(0, best)[0], self.upper.gather(0, best)[0]


def upper_quantiles(
    groups: Float[Tensor, "rows values"], fractions: tuple[float, ...]
) -> Float[Tensor, "fractions rows"]:
    """Quantiles near the top of each row, linearly interpolated as in `torch.quantile`.

    Only the tail is selected, so that rows of any length cost one partial sort.

    Example:
        >>> upper_quantiles(torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]]), (0.875, 1.0))
        tensor([[3.5000],
                [4.0000]])
    """
    return _quantiles(groups, fractions, largest=True)


def lower_quantiles(
    groups: Float[Tensor, "rows values"], fractions: tuple[float, ...]
) -> Float[Tensor, "fractions rows"]:
    """The quantiles 1 - p near the bottom of each row, as `upper_quantiles`."""
    return _quantiles(groups, fractions, largest=False)


def _quantiles(groups: Tensor, fractions: tuple[float, ...], largest: bool) -> Tensor:
    last = groups.shape[1] - 1
    ranks = [fraction * last for fraction in fractions]  # counted from the other end
    tail = min(last + 1, last - int(min(ranks)) + 1)
    end = _tail(groups, tail, largest)
    quantiles = []
    for rank in ranks:
        below = int(rank)
        above = min(below + 1, last)
        quantiles.append(torch.lerp(end[:, last - below], end[:, last - above], rank - below))
    return torch.stack(quantiles)


def _tail(groups: Tensor, count: int, largest: bool) -> Tensor:
    """The `count` outermost values of each row, from the end inwards.

    They lie in the `count` blocks of outermost ends, for these hold `count` values at least that
    far out; only those blocks are sorted, and in a single row what lies as far out as their ends.
    """
    whole = groups.shape[1] // BLOCK * BLOCK
    if whole < 4 * BLOCK * count:
        return groups.topk(count, dim=1, largest=largest).values
    blocks, rest = groups[:, :whole].unflatten(1, (-1, BLOCK)), groups[:, whole:]
    ends = blocks.amax(2) if largest else blocks.amin(2)
    bounds, at = ends.topk(count, dim=1, largest=largest, sorted=False)
    near = blocks.take_along_dim(at[:, :, None], 1).flatten(1)
    near = torch.cat([near, rest], 1)
    if len(near) == 1:
        near = near[near >= bounds.amin() if largest else near <= bounds.amax()][None]
    return near.topk(count, dim=1, largest=largest).values

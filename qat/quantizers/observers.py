"""Statistics that choose the clipping range of an operand: min-max, percentiles, squared error.

An observer sees batches and answers with a range; it never quantizes a model. Its buffers have
their final shape from the start and stay out of checkpoints: once a quantizer is frozen, the range
lives in its scale.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat.spec import Granularity, QuantSpec

PART = 2**17
"""Values that a search looks at together."""


class Observer(nn.Module, ABC):
    """Accumulates statistics of one operand.

    Args:
        spec: Bits, sign and granularity of the operand.
        shape: Its trailing shape.
    """

    contains_zero: ClassVar[bool] = True
    """Whether an unsigned grid is widened so that zero has a code."""

    count: Tensor

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.spec = spec
        self.num_trailing = len(shape)
        self.scale_shape = spec.scale_shape(shape)
        self.register_buffer("count", torch.zeros((), dtype=torch.long), persistent=False)
        self._start: dict[str, float] = {"count": 0}

    @abstractmethod
    def update(self, groups: Float[Tensor, "scales values"]) -> None:
        """Accumulate the values that share each scale, one row a scale."""

    @abstractmethod
    def bounds(self) -> tuple[Float[Tensor, " scales"], Float[Tensor, " scales"]]:
        """Lower and upper bound of each scale's clipping range."""

    def observe(self, x: Float[Tensor, "..."]) -> None:
        """Accumulate one batch of finite values."""
        self.update(self._groups(x))
        self.count += 1

    def range(self) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """Clipping range observed so far, in the shape of the scale.

        Raises:
            RuntimeError: If nothing was observed.
        """
        if not self.count:
            raise RuntimeError(
                "no batch was observed; run `qat.calibrate(model, batches)` with at least one batch"
            )
        lower, upper = self.bounds()
        return lower.reshape(self.scale_shape), upper.reshape(self.scale_shape)

    def reset(self) -> None:
        """Forget every batch."""
        for name, value in self._start.items():
            self.get_buffer(name).fill_(value)

    def _groups(self, x: Tensor) -> Tensor:
        """Reorder `x` to one row of values for each scale."""
        if self.spec.granularity is Granularity.PER_TENSOR:
            return x.reshape(1, -1)
        axis = x.ndim - self.num_trailing
        return x.movedim(axis, 0).reshape(x.shape[axis], -1).contiguous()

    def _buffer(self, name: str, value: float, *extra: int) -> None:
        num_scales = self.scale_shape[0] if self.scale_shape else 1
        self.register_buffer(name, torch.full((*extra, num_scales), value), persistent=False)
        self._start[name] = value


ObserverFactory = Callable[[QuantSpec, tuple[int, ...]], Observer]


class MinMax(Observer):
    """The range from the smallest to the largest value seen."""

    lower: Tensor
    upper: Tensor

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...]) -> None:
        super().__init__(spec, shape)
        self._buffer("lower", float("inf"))
        self._buffer("upper", float("-inf"))

    def update(self, groups: Tensor) -> None:
        """Widen the range."""
        torch.minimum(self.lower, groups.amin(1), out=self.lower)
        torch.maximum(self.upper, groups.amax(1), out=self.upper)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value."""
        return self.lower, self.upper


class Percentile(Observer):
    """The range between two order statistics of a batch, averaged over batches.

    Args:
        spec: Bits, sign and granularity of the operand.
        shape: Its trailing shape.
        fraction: Share of the values kept below the upper bound, and above the lower one.
    """

    lower: Tensor
    upper: Tensor

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...], fraction: float = 0.9999) -> None:
        super().__init__(spec, shape)
        if not 0.5 < fraction <= 1:
            raise ValueError(f"Percentile.fraction must be in (0.5, 1], got {fraction}")
        self.fraction = fraction
        self._buffer("lower", 0.0)
        self._buffer("upper", 0.0)

    def update(self, groups: Tensor) -> None:
        """Add this batch's order statistics. Only the tail is selected, nothing is sorted."""
        tail = max(1, round((1 - self.fraction) * groups.shape[1]))
        self.upper += groups.topk(tail, dim=1).values[:, -1]
        self.lower += groups.topk(tail, dim=1, largest=False).values[:, -1]

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Mean order statistics over batches."""
        return self.lower / self.count, self.upper / self.count


class MSE(Observer):
    """The range, a shrunken min-max range, whose grid has the least squared error.

    The first batch fixes the candidates, all fractions of its min-max range; the errors of all
    batches, clipping included, then choose among them.

    Args:
        spec: Bits, sign and granularity of the operand.
        shape: Its trailing shape.
        num_candidates: Number of fractions tried, evenly spaced down to `smallest`.
        smallest: Smallest fraction of the min-max range tried.
    """

    error: Tensor
    lower: Tensor
    upper: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...],
        num_candidates: int = 40,
        smallest: float = 0.2,
    ) -> None:
        super().__init__(spec, shape)
        if num_candidates < 1 or not 0 < smallest <= 1:
            raise ValueError(
                "MSE needs num_candidates of at least 1 and smallest in (0, 1], "
                f"got {num_candidates} and {smallest}"
            )
        fractions = torch.linspace(1.0, smallest, num_candidates)
        self.register_buffer("fractions", fractions, persistent=False)
        self.fractions: Tensor
        self._buffer("error", 0.0, num_candidates)
        self._buffer("lower", 0.0)
        self._buffer("upper", 0.0)

    def update(self, groups: Tensor) -> None:
        """Add the error of every candidate on this batch."""
        if not self.count:
            self.lower.copy_(groups.amin(1))
            self.upper.copy_(groups.amax(1))
        grids = [
            scale_of_range(self.lower * fraction, self.upper * fraction, self.spec)
            for fraction in self.fractions
        ]
        for part, scratch in in_parts(groups):
            for i, grid in enumerate(grids):
                self.error[i] += squared_errors(part, *grid, self.spec, scratch).sum(1)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The candidate of least error, scale by scale."""
        best = self.fractions[self.error.argmin(0)]
        return self.lower * best, self.upper * best


def in_parts(
    groups: Float[Tensor, "rows values"], multiple: int = 1
) -> Iterator[tuple[Float[Tensor, "rows part"], Float[Tensor, "rows part"]]]:
    """Values in parts that stay in the cache of a processor, each with room for as many results.

    Several passes over each part are many times faster than over all values.

    Args:
        groups: The values.
        multiple: Length of what is not cut apart.
    """
    size = max(1, PART // len(groups) // multiple) * multiple
    scratch = torch.empty_like(groups[:, :size])
    for part in groups.split(size, dim=1):
        yield part, scratch[:, : part.shape[1]]


def squared_errors(
    groups: Float[Tensor, "rows values"],
    scale: Float[Tensor, " rows"],
    zero_point: Float[Tensor, " rows"] | None,
    spec: QuantSpec,
    out: Float[Tensor, "rows values"] | None = None,
) -> Float[Tensor, "rows values"]:
    """Squared quantization error of each value, one scale for each row, in `out` if given."""
    values = torch.div(groups, scale[:, None], out=out).round_()
    if zero_point is not None:
        values.add_(zero_point[:, None])
    values.clamp_(spec.qmin, spec.qmax)
    if zero_point is not None:
        values.sub_(zero_point[:, None])
    return values.mul_(scale[:, None]).sub_(groups).square_()


def scale_of_range(
    lower: Float[Tensor, "*scales"],
    upper: Float[Tensor, "*scales"],
    spec: QuantSpec,
    *,
    contains_zero: bool = True,
) -> tuple[Float[Tensor, "*scales"], Float[Tensor, "*scales"] | None]:
    """Scale and zero point of the grid that covers [lower, upper].

    A signed grid has no zero point; its scale is the smallest whose grid covers both ends. An
    unsigned one is widened to contain zero, so that zero has a code; without `contains_zero` it is
    not, and its zero point may lie outside the codes. An empty range, that of a constant channel,
    is always widened; one that is empty even then, of a channel of zeros, gets scale 1.

    Example:
        >>> scale_of_range(torch.tensor(-1.0), torch.tensor(2.0), QuantSpec(2, signed=False))
        (tensor(1.), tensor(1.))
    """
    if spec.signed:
        scale = torch.maximum(lower / spec.qmin, upper / spec.qmax)
        return torch.where(scale > 0, scale, 1.0), None
    widen = upper <= lower if not contains_zero else torch.ones_like(lower, dtype=torch.bool)
    lower = torch.where(widen, lower.clamp(max=0), lower)
    upper = torch.where(widen, upper.clamp(min=0), upper)
    scale = (upper - lower) / spec.qmax
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (-lower / scale).round()

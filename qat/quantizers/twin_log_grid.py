"""The grids of Twin-Log Quantization (TLQ), a logarithmic one for each sign, and their search.

LRQ-DiT, Yang et al., https://arxiv.org/abs/2508.03485. For a weight w of an output channel (row):

    position   t = log2(|w| / m + eta)
    code       q = clip(round((t - lo) / d), 0, size - 1)
    value      sign(w) m (2^(lo + q d) - eta)

Symbols: m = `gain`, lo = `lowest`, d = `step`, one for each sign and row; eta = `offset`. With n
bits and L = 2^(n-1), the modes are

    paper   m = 1, eta = 0; lo = z d with a whole z; the range of the logs of one sign, its top
            clipped to a quantile; L codes a sign, and zero
    code    the authors' repository: eta is searched; the logs of the other sign count as 0 in
            quantile and minimum; L codes for positive weights, L + 1 for negative ones, and zero
    clean   m = max |w|, one lo and d for both signs, lo at the smallest weight, the top at a
            searched share of the largest: free of the weights' scale, 2^n codes

so that only `clean` is a true n-bit format. Clips and offset are searched for least squared error
over the matrix; the error is a sum over signs, so 13 x (5 + 5) trials replace 13 x 25.

Hardware needs no power function: see `shift_and_multiply`.

Provenance: `paper` from secondary notes that quote the equations (1-7); that its L codes a sign
span the range, as in Eq. 1, is *reconstructed*. `code` from the authors' repository (commit
84398f3), read, not copied. `clean` is ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

OFFSETS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
QUANTILES = (0.98, 0.99, 0.999, 0.9999, 0.99999)
SHARES = tuple(0.5 + 0.05 * i for i in range(11))
PART = 2**17
"""Weights that a search looks at together."""

Range = tuple[Float[Tensor, "clips rows"], Float[Tensor, "clips rows"]]
"""Lowest position and step of every candidate clip and row."""


def range_of_code(logs: Tensor, mask: Tensor, offset: float, size: int) -> Range:
    """Ranges of the authors' code: weights of the other sign have log 0."""
    logs = torch.where(mask, logs, 0.0)
    last = logs.shape[1] - 1
    ranks = [round(p * last) for p in QUANTILES]
    top = logs.sort(1).values[:, ranks].T
    return _whole(logs.amin(1).expand_as(top), top, size)


def range_of_paper(logs: Tensor, mask: Tensor, offset: float, size: int) -> Range:
    """Ranges over the weights of one sign only; rows without any get a step of one."""
    ordered = torch.where(mask, logs, -torch.inf).sort(1).values
    count = mask.sum(1)
    first = logs.shape[1] - count
    p = torch.tensor(QUANTILES, device=logs.device)[:, None]
    ranks = (first + (p * (count - 1)).round().long()).clamp(0, logs.shape[1] - 1)
    top = ordered.gather(1, ranks.T).T
    low = ordered.gather(1, first.clamp(max=logs.shape[1] - 1)[:, None]).T
    low, top = (torch.where(count > 0, bound, 0.0) for bound in (low, top))
    return _whole(low.expand_as(top), top, size - 1)


def range_of_clean(logs: Tensor, mask: Tensor, offset: float, size: int) -> Range:
    """From the smallest weight to shares of the largest."""
    low = logs.amin(1)
    top = torch.tensor([math.log2(share + offset) for share in SHARES], device=logs.device)
    step = _positive((top[:, None] - low) / (size - 1))
    return low.expand_as(step), step


def _whole(low: Tensor, top: Tensor, num_steps: int) -> Range:
    """A range that begins at a whole number of steps."""
    step = _positive((top - low) / num_steps)
    return (low / step).round() * step, step


def _positive(step: Tensor) -> Tensor:
    return torch.where(step > 0, step, 1.0)


@dataclass(frozen=True)
class Mode:
    """One reading of the method, see the module.

    Attributes:
        find_range: From logs, the mask of one sign, the offset and L, to ranges.
        offsets: Candidates of eta.
        extra: Codes for negative weights beyond L.
        shared: Both signs share one range, rows are divided by their largest weight, and zero
            has no code of its own.
    """

    find_range: Callable[[Tensor, Tensor, float, int], Range]
    offsets: tuple[float, ...]
    extra: int = 0
    shared: bool = False


MODES = {
    "paper": Mode(range_of_paper, (0.0,)),
    "code": Mode(range_of_code, OFFSETS, extra=1),
    "clean": Mode(range_of_clean, tuple(eta for eta in OFFSETS if eta), shared=True),
}


@dataclass(frozen=True)
class Grid:
    """The grid of every row.

    Attributes:
        gain: m, (rows).
        lowest: lo of positive and of negative weights, (2, rows).
        step: d likewise, (2, rows).
        offset: eta, a scalar.
    """

    gain: Tensor
    lowest: Tensor
    step: Tensor
    offset: Tensor

    def levels(self, side: int, size: int) -> Float[Tensor, "rows size"]:
        """Magnitude of every code of one sign; 0 is positive."""
        q = torch.arange(size, device=self.step.device, dtype=self.step.dtype)
        exponent = self.lowest[side][:, None] + q * self.step[side][:, None]
        return self.gain[:, None] * (exponent.exp2() - self.offset)

    def positions(self, rows: Float[Tensor, "rows n"], side: int) -> Float[Tensor, "rows n"]:
        """Codes before rounding and clipping."""
        logs = (rows.abs() / self.gain[:, None] + self.offset).log2()
        return (logs - self.lowest[side][:, None]) / self.step[side][:, None]


@torch.no_grad()
def search(rows: Float[Tensor, "rows n"], bits: int, mode: Mode) -> Grid:
    """The grid of least squared error over a weight matrix."""
    size = 2 ** (bits - 1)
    sizes = (size, size + mode.extra)
    everything = torch.ones_like(rows, dtype=torch.bool)
    masks = (everything,) if mode.shared else (rows > 0, rows < 0)
    gain = rows.abs().amax(1) if mode.shared else torch.ones_like(rows[:, 0])
    gain = _positive(gain)
    best, least = None, math.inf
    for offset in mode.offsets:
        logs = (rows.abs() / gain[:, None] + offset).log2()
        found, total = [], 0.0
        for mask, num_codes in zip(masks, sizes, strict=False):
            low, step = mode.find_range(logs, mask, offset, size)
            errors = _errors(rows, logs, mask, gain, low, step, offset, num_codes)
            clip = int(errors.argmin())
            found.append((low[clip], step[clip]))
            total += float(errors[clip])
        if total < least:
            least = total
            low, step = zip(*(found * 2 if mode.shared else found), strict=True)
            eta = torch.tensor(offset, dtype=rows.dtype, device=rows.device)
            best = Grid(gain, torch.stack(low), torch.stack(step), eta)
    assert best is not None, "weights are finite"
    return best


def _errors(
    rows: Float[Tensor, "rows n"],
    logs: Float[Tensor, "rows n"],
    mask: Bool[Tensor, "rows n"],
    gain: Float[Tensor, " rows"],
    low: Float[Tensor, "clips rows"],
    step: Float[Tensor, "clips rows"],
    offset: float,
    size: int,
) -> Float[Tensor, " clips"]:
    """Squared error of every clip over the weights of a mask, all clips at once."""
    total = torch.zeros(len(low), dtype=torch.float64, device=rows.device)
    num_rows = max(1, PART // (rows.shape[1] * len(low)))  # parts that fit the cache
    for first in range(0, len(rows), num_rows):
        part = slice(first, first + num_rows)
        lowest, steps = low[:, part, None], step[:, part, None]
        codes = logs[part].sub(lowest).div_(steps).round_().clamp_(0, size - 1)
        values = codes.mul_(steps).add_(lowest).exp2_().sub_(offset).mul_(gain[part, None])
        errors = values.sub_(rows[part].abs()).square_().mul_(mask[part])
        total += errors.sum((1, 2), dtype=torch.float64)
    return total


def shift_and_multiply(
    exponent: Float[Tensor, "*shape"], fraction_bits: int
) -> tuple[Int[Tensor, "*shape"], Int[Tensor, "*shape"]]:
    """A power of two as an integer and a shift: `2^e ~ multiplier * 2^shift`.

    With f = floor(e) and r = e - f, the multiplier is `round(2^r 2^I)` and the shift f - I; the
    relative error is at most `2^-(I + 1)`, because 2^r is at least one.

    Args:
        exponent: e, such as `lo + q d`.
        fraction_bits: I; the multiplier has one bit more.

    Raises:
        ValueError: If `fraction_bits` is outside 1 to 20.

    Example:
        >>> shift_and_multiply(torch.tensor([-0.5, 3.0]), 4)
        (tensor([23, 16]), tensor([-5, -1]))
    """
    if not 1 <= fraction_bits <= 20:
        raise ValueError(f"fraction_bits must be 1 to 20, got {fraction_bits}")
    whole = exponent.floor()
    multiplier = ((exponent - whole).exp2() * 2**fraction_bits).round()
    return multiplier.long(), whole.long() - fraction_bits

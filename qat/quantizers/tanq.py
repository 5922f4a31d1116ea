"""TanQ (reconstructed): tangent quantization of attention maps, fine near 0 and near s.

DopQ-ViT: Yang et al., https://arxiv.org/abs/2408.03291. What is certain is the aim, not the
formula: a quantizer built on the tangent, dense near 0 and attentive to the rare values near 1.

    u       = clip(A / s, 0, 1)
    T(u)    = tan(alpha (u - beta)),   alpha max(beta, 1 - beta) < pi / 2
    codes   q = round((T(u) - T(0)) / D),   D = (T(1) - T(0)) / (2^b - 1)
    output  s (beta + arctan(T(0) + q D) / alpha)

Symbols: s = `scale`, alpha = `steepness`, beta = `centre` of the coarse zone. 0 and s are levels.
Form T1 searches the centre, form T2 fixes it at 1/2. The search minimises the squared error of A,
weighted, over a histogram of all observed values, so that thousands of candidates cost one pass.
Provenance: **reconstruction**. The tangent goes forward, not the arctangent: only then are the
steps small at both ends. Form T3, the reverse, is refuted in docs/archive/log_2026-11.md.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from qat import ops
from qat.quantizers.companding import Companding
from qat.spec import Operand, QuantSpec

NUM_BINS = 4096
SHARES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
"""Candidate steepnesses, as shares of the largest one that the centre allows."""
CENTRES = tuple(i / 20 for i in range(6, 18))
QUANTILES = (0.999, 0.9999, 0.99999, 1.0)


def tangent_code(
    u: Float[Tensor, "..."],
    steepness: Float[Tensor, "..."],
    centre: Float[Tensor, "..."],
    num_codes: int,
) -> Float[Tensor, "..."]:
    """Position of values in [0, 1] on the scale of codes, 0 to num_codes - 1, not rounded."""
    start = torch.tan(-steepness * centre)
    step = (torch.tan(steepness * (1 - centre)) - start) / (num_codes - 1)
    return (torch.tan((u - centre) * steepness) - start) / step


def tangent_level(
    codes: Float[Tensor, "..."],
    steepness: Float[Tensor, "..."],
    centre: Float[Tensor, "..."],
    num_codes: int,
) -> Float[Tensor, "..."]:
    """Value in [0, 1] of a code; the inverse of `tangent_code`."""
    start = torch.tan(-steepness * centre)
    step = (torch.tan(steepness * (1 - centre)) - start) / (num_codes - 1)
    return (centre + torch.atan(start + codes * step) / steepness).clamp(0, 1)


class TanQ(Companding):
    """Tangent quantizer with clipping scale, steepness and centre found by search.

    Args:
        spec: Bits.
        shape: Trailing shape of the operand.
        operand: Role of the tensor in its product.
        form: `t1` searches the centre, `t2` keeps it at one half.
        learn_scale: Train the scale.
    """

    steepness: Tensor
    centre: Tensor
    counts: Tensor
    sums: Tensor
    largest: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...],
        operand: Operand = Operand.ATTENTION,
        *,
        form: str = "t1",
        learn_scale: bool = False,
    ) -> None:
        super().__init__(spec, shape, operand, learn_scale=learn_scale)
        if form not in ("t1", "t2"):
            raise ValueError(f"TanQ.form must be 't1' or 't2', got '{form}'")
        self.centres = CENTRES if form == "t1" else (0.5,)
        self.register_buffer("steepness", torch.tensor(2.0))
        self.register_buffer("centre", torch.tensor(0.5))
        # Of each bin: number and sum of the values seen. Bins are even in the fourth root.
        self.register_buffer("counts", torch.zeros(NUM_BINS), persistent=False)
        self.register_buffer("sums", torch.zeros(NUM_BINS), persistent=False)
        self.register_buffer("largest", torch.zeros(()), persistent=False)

    def levels(self) -> Tensor:
        """Levels from 0 to 1."""
        codes = torch.arange(self.num_codes).to(self.scale)
        return tangent_level(codes, self.steepness, self.centre, self.num_codes)

    def compress(self, u: Tensor) -> Tensor:
        """Position on the scale of codes."""
        return tangent_code(u, self.steepness, self.centre, self.num_codes)

    def observe(self, x: Tensor) -> None:
        """Add a batch to the histogram, whose range is that of attention, 0 to 1."""
        values = x.flatten().clamp(0, 1)
        bins = (values.sqrt().sqrt_() * (NUM_BINS - 1)).int()
        self.counts += torch.bincount(bins, minlength=NUM_BINS)
        self.sums += torch.bincount(bins, values, NUM_BINS)
        torch.maximum(self.largest, values.max(), out=self.largest)

    def forget(self) -> None:
        """Empty the histogram."""
        for statistic in (self.counts, self.sums, self.largest):
            statistic.zero_()

    @torch.no_grad()
    def freeze(self) -> None:
        """Scale, steepness and centre of least squared error."""
        if not self.counts.any():
            raise RuntimeError("no batch was observed; calibrate with at least one batch")
        seen = self.counts > 0
        counts = self.counts[seen]
        values = self.sums[seen] / counts
        best = math.inf
        for scale in self._scales(values, counts):
            u = (values / scale).clamp(max=1)
            for centre in self.centres:
                limit = math.pi / 2 / max(centre, 1 - centre)
                grid = torch.tensor(SHARES, device=u.device)[:, None] * limit
                middle = torch.tensor(centre, device=u.device)
                codes = tangent_code(u, grid, middle, self.num_codes).round_()
                codes.clamp_(0, self.num_codes - 1)
                output = tangent_level(codes, grid, middle, self.num_codes) * scale
                errors = ((output - values).square_() * counts).sum(1)
                if errors.min() < best:
                    best = errors.min().item()
                    self.scale.copy_(scale)
                    self.centre.copy_(middle)
                    self.steepness.copy_(grid[errors.argmin(), 0])

    def boundary_distance(self, x: Tensor) -> Tensor:
        """Distance to the nearest rounding boundary, in codes."""
        u = (x.detach() / self.scale.detach()).clamp_(0, 1)
        return ops.boundary_distance(self.compress(u))

    def _scales(self, values: Tensor, counts: Tensor) -> Tensor:
        """Clipping candidates: quantiles of the histogram, and the largest value."""
        share = counts.cumsum(0) / counts.sum()
        index = [int((share < q).sum().clamp(max=len(values) - 1)) for q in QUANTILES[:-1]]
        scales = torch.stack([*values[index], self.largest])
        return torch.where(scales > 0, scales, 1.0).unique()

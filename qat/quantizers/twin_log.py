"""Twin-Log Quantization (TLQ) of weights (LRQ-DiT, Yang et al., https://arxiv.org/abs/2508.03485).

The quantizer; `qat.quantizers.twin_log_grid` has the equations, the modes and the search.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from qat import ops
from qat.quantizers.base import Codes, Quantizer
from qat.quantizers.twin_log_grid import MODES, Grid, search
from qat.spec import Granularity, Operand, QuantSpec


class TwinLog(Quantizer):
    """Weights on two logarithmic grids. Codes are indices of a table for each row.

    Args:
        spec: Bits and granularity. Codes are indices, so the spec is unsigned.
        shape: Shape of the weight, output channels first.
        operand: Role of the tensor; a weight.
        mode: `paper`, `code` or `clean`, see `qat.quantizers.twin_log_grid`.

    Raises:
        ValueError: If the operand is no weight, the spec is signed or the mode unknown.
    """

    supported_bits = range(2, 9)
    gain: Tensor
    lowest: Tensor
    step: Tensor
    offset: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...],
        operand: Operand = Operand.WEIGHT,
        *,
        mode: str = "clean",
    ) -> None:
        super().__init__(spec, shape, operand)
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got '{mode}'")
        if operand is not Operand.WEIGHT or spec.signed:
            raise ValueError(
                f"TwinLog quantizes weights, by codes that index a table; got a "
                f"{'signed' if spec.signed else 'unsigned'} spec for the {operand}; write "
                f"weight: {{bits: {spec.bits}, signed: false}}, and take DynamicToken for inputs"
            )
        self.mode = mode
        size = 2 ** (spec.bits - 1)
        self.sizes = (size, size + MODES[mode].extra)
        num_rows = shape[0] if spec.granularity is Granularity.PER_CHANNEL else 1
        self.register_buffer("gain", torch.ones(num_rows))
        self.register_buffer("lowest", torch.zeros(2, num_rows))
        self.register_buffer("step", torch.ones(2, num_rows))
        self.register_buffer("offset", torch.zeros(()))
        self._seen: Tensor | None = None

    @property
    def num_codes(self) -> int:
        """Values of the grid: 2^bits, and in the literal modes zero and what the code adds."""
        return sum(self.sizes) + (not MODES[self.mode].shared)

    @property
    def num_extra_scales(self) -> int:
        """Numbers, beside the gain, that define the grid; what both signs share counts once."""
        if MODES[self.mode].shared:
            return 2 * self.gain.numel() + 1
        return 3 * self.gain.numel() + 1  # two ranges, and no gain

    @property
    def grid(self) -> Grid:
        """The grid."""
        return Grid(self.gain, self.lowest, self.step, self.offset)

    def observe(self, x: Tensor) -> None:
        """Keep the weights; the last ones seen count."""
        self._seen = self._rows(x)

    def forget(self) -> None:
        """Drop the weights."""
        self._seen = None

    def freeze(self) -> None:
        """Search the grid."""
        if self._seen is None:
            raise RuntimeError("no weight was observed; calibrate first")
        grid = search(self._seen, self.spec.bits, MODES[self.mode])
        for name in ("gain", "lowest", "step", "offset"):
            getattr(self, name).copy_(getattr(grid, name))

    def table(self) -> Float[Tensor, "rows codes"]:
        """Value of every code: positive ones, negative ones, and zero where it has a code."""
        positive, negative = (self.grid.levels(side, size) for side, size in enumerate(self.sizes))
        zero = positive.new_zeros(len(positive), self.num_codes - sum(self.sizes))
        return torch.cat([positive, -negative, zero], 1)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Nearest level in the logarithm; straight through within the largest level."""
        with torch.no_grad():
            table = self.table()
            out = self._values(self._indices(x), table)
            largest = table.abs().amax(1).reshape(-1, *(1 for _ in x.shape[1:]))
        return ops.straight_through(x, out, x.detach().abs() <= largest)

    def encode(self, x: Tensor) -> Codes:
        """Indices of `x` in the tables of its rows."""
        table = self.table()
        values = self._indices(x).to(ops.code_dtype(0, self.num_codes - 1))
        return Codes(values, table.abs().amax(1), table=table)

    def decode(self, codes: Codes) -> Tensor:
        """Levels of the indices."""
        assert codes.table is not None
        return self._values(codes.values, codes.table)

    def _values(self, indices: Shaped[Tensor, "*shape"], table: Tensor) -> Tensor:
        return table.gather(1, self._rows(indices).long()).reshape(indices.shape)

    def _indices(self, x: Tensor) -> Tensor:
        rows, grid = self._rows(x), self.grid
        below = rows < 0
        positive = grid.positions(rows, 0).round_().clamp_(0, self.sizes[0] - 1)
        if MODES[self.mode].shared:
            return positive.add_(below, alpha=self.sizes[0]).reshape(x.shape)
        negative = grid.positions(rows, 1).round_().clamp_(0, self.sizes[1] - 1)
        indices = torch.where(below, negative + self.sizes[0], positive)
        return torch.where(rows == 0, float(self.num_codes - 1), indices).reshape(x.shape)

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(len(self.gain), -1)

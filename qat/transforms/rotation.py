"""Rotations that spread outliers: Hadamard matrices and the dual transformation, as pure functions.

LRQ-DiT, Yang et al., https://arxiv.org/abs/2508.03485, sec. "Adaptive Rotation Scheme"; the dual
transformation is that of DuQuant, Lin et al., NeurIPS 2024, https://arxiv.org/abs/2406.01721.

    Y = X W^T = (X R)(W R)^T,   R R^T = 1                                            (Eq. 2)
    J = ||X||_F / sqrt(B N C), the root mean square of a layer's input               (Eq. 11)
    J below the threshold: R a random-sign Hadamard matrix;  else R = R1 P R2        (Eq. 12)

R1 and R2 are block-diagonal, with one block for all groups of channels; P is a permutation.

Provenance: equations from secondary notes; the greedy search and the permutation from the authors'
code (commit 84398f3) and DuQuant's, read, not copied. Their Hadamard helper is missing from the
release; random signs times a known matrix, as QuaRot has it, is *reconstructed*. Prefixes of the
greedy search may be empty here, so that a rotation never raises the peak.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Rule = Literal["column", "row"]
"""Which index is swapped to the front: the extreme entry's channel, or, as in the released code of
LRQ-DiT and of DuQuant, the number of its row modulo the size of the block."""
Deal = Literal["stride", "zigzag"]
"""How sorted channels are dealt to groups: in strides of 9 (LRQ-DiT), or to and fro (DuQuant)."""

STRIDE = 9


def fluctuation(x: Float[Tensor, "..."]) -> float:
    """J, the root mean square of a layer's input."""
    return float(x.double().square().mean().sqrt())


def hadamard_factors(size: int) -> tuple[int, int]:
    """A size as m times a power of two, with m one or the order of a Paley matrix.

    Raises:
        ValueError: If no such matrix is known.

    Example:
        >>> hadamard_factors(1152), hadamard_factors(64)
        ((36, 32), (1, 64))
    """
    power = size & -size
    odd = size // power
    if odd == 1:
        return 1, size
    m = 4 * odd
    while size % m == 0:
        if _paley_prime(m) is not None:
            return m, size // m
        m *= 2
    raise ValueError(
        f"no Hadamard matrix of size {size} is known here: it needs a power of two times a Paley "
        "order such as 12, 20, 28 or 36; use the dual transformation for this width"
    )


def hadamard(size: int) -> Float[Tensor, "size size"]:
    """A Hadamard matrix divided by the root of its size, so that it is orthogonal.

    Sylvester's for powers of two; otherwise a Paley matrix times that.

    Raises:
        ValueError: If no matrix of that size is known.
    """
    m, power = hadamard_factors(size)
    return torch.kron(signs_of_paley(m), sylvester(power)) / math.sqrt(size)


def sylvester(size: int) -> Float[Tensor, "size size"]:
    """The matrix of +1 and -1 whose size is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def signs_of_paley(size: int) -> Float[Tensor, "size size"]:
    """Paley's matrix of +1 and -1, of size q + 1 or 2 (q + 1) for a prime q.

    The first for q = 3 mod 4, the second for q = 1 mod 4; made of the Jacobsthal matrix, the
    quadratic characters of differences mod q.
    """
    if size == 1:
        return torch.ones(1, 1)
    q = _paley_prime(size)
    assert q is not None
    squares = {x * x % q for x in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if x in squares else -1.0 for x in range(1, q)])
    index = torch.arange(q)
    jacobsthal = character[(index[:, None] - index) % q]
    border = torch.zeros(q + 1, q + 1)
    border[1:, 1:] = jacobsthal
    border[0, 1:] = 1.0
    border[1:, 0] = 1.0 if q % 4 == 1 else -1.0
    identity = torch.eye(q + 1)
    if q % 4 == 3:
        return border + identity
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(border, plus) + torch.kron(identity, minus)


def _paley_prime(size: int) -> int | None:
    for q, residue in ((size - 1, 3), (size // 2 - 1, 1)):
        if q > 2 and q % 4 == residue and all(q % d for d in range(2, math.isqrt(q) + 1)):
            return q
    return None


def base_rotation(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """An orthogonal matrix whose first row is constant, and which is random otherwise.

    A value in channel 0 is spread evenly over all channels. The first row comes from a Householder
    reflection, which has the same use as a chain of plane rotations; the other rows are turned by a
    random orthogonal matrix.
    """
    v = torch.full((size,), -1 / math.sqrt(size), dtype=torch.float64)
    v[0] += 1.0
    norm = v.square().sum()
    reflection = torch.eye(size, dtype=torch.float64)
    if norm > 0:
        reflection -= 2 * torch.outer(v, v) / norm
    turn = torch.eye(size, dtype=torch.float64)
    if size > 1:
        random = torch.randn(size - 1, size - 1, generator=generator, dtype=torch.float64)
        turn[1:, 1:] = torch.linalg.qr(random).Q
    return (turn @ reflection).float()


def greedy_rotation(
    x: Float[Tensor, "tokens channels"],
    size: int,
    generator: torch.Generator,
    *,
    num_steps: int = 256,
    rule: Rule = "column",
) -> Float[Tensor, "size size"]:
    """A block rotation that flattens the peaks of `x`, one extreme entry after another.

    In each step the base rotation, its first row and column swapped with the channel of the extreme
    entry, is applied to all groups of channels; the product with the smallest range is kept.

    Args:
        x: Tokens of a layer's input.
        size: Channels of a group; divides the number of channels.
        generator: Draws the base rotation.
        num_steps: Longest product.
        rule: Which index is swapped.
    """
    base = base_rotation(size, generator).to(x)
    groups = x.reshape(-1, size).clone()
    total = torch.eye(size, dtype=x.dtype, device=x.device)
    best, least = total, _peak_to_peak(groups)
    for _ in range(num_steps):
        row, column = divmod(int(groups.abs().argmax()), size)
        index = column if rule == "column" else row % size
        order = torch.arange(size, device=x.device)
        order[0], order[index] = index, 0
        step = base[order][:, order]
        groups, total = groups @ step, total @ step
        if (peak := _peak_to_peak(groups)) < least:
            best, least = total, peak
    return best


def _peak_to_peak(x: Tensor) -> float:
    low, high = x.aminmax()
    return float(high - low)


def deal_channels(
    x: Float[Tensor, "tokens channels"], size: int, deal: Deal = "stride"
) -> Int[Tensor, " channels"]:
    """An order of channels that spreads those of large range over the groups.

    Example:
        >>> x = torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
        >>> deal_channels(x, 2, "zigzag")
        tensor([0, 3, 1, 2])
    """
    spread = x.amax(0) - x.amin(0)
    ranked = spread.argsort(descending=True, stable=True)
    if deal == "stride":
        return torch.cat([ranked[first::STRIDE] for first in range(STRIDE)])
    rounds = ranked.view(size, -1).clone()  # a round gives one channel to each group
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.reshape(-1)


def dual_transformation(
    x: Float[Tensor, "tokens channels"],
    size: int,
    generator: torch.Generator,
    *,
    num_steps: int = 256,
    rule: Rule = "column",
    deal: Deal = "stride",
) -> tuple[Tensor, Tensor, Tensor]:
    """R1, P and R2 of a layer's input: greedy rotation, dealt channels, greedy rotation.

    Args:
        x: Tokens of the input.
        size: Channels of a group.
        generator: Draws both base rotations.
        num_steps: Longest product of each rotation.
        rule: See `Rule`.
        deal: See `Deal`.

    Returns:
        The block of R1, P as an order of channels, and the block of R2.
    """
    first = greedy_rotation(x, size, generator, num_steps=num_steps, rule=rule)
    x = (x.reshape(-1, size) @ first).reshape(x.shape)
    order = deal_channels(x, size, deal)
    second = greedy_rotation(x[:, order], size, generator, num_steps=num_steps, rule=rule)
    return first, order, second


def block_size(channels: int, largest: int = 128) -> int:
    """The largest divisor of `channels` that is at most `largest`."""
    return max(size for size in range(1, largest + 1) if channels % size == 0)


def smoothing_scale(
    weight: Float[Tensor, "out channels"], largest_input: Float[Tensor, " channels"]
) -> Float[Tensor, " channels"]:
    """Factor of each input channel that moves half of its range, in the log, into the weight.

    `sqrt(max |W_c| / max |X_c|)`, SmoothQuant (Xiao et al., ICML 2023) with exponent 1/2; 1 for
    channels that are zero in either, which LRQ-DiT's code does not guard.
    """
    ratio = weight.abs().amax(0) / largest_input
    usable = ratio.isfinite() & (ratio > 0)
    return torch.where(usable, ratio, 1.0).sqrt()

"""Arithmetic of quantization as pure functions. Rounding is half to even, as in `torch.round`."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.autograd import Function

_hardtanh_backward = torch.ops.aten.hardtanh_backward
"""The gradient inside of two bounds, 0 outside; one pass, where comparisons are slow to store."""


def quantize(
    x: Float[Tensor, "..."],
    scale: Float[Tensor, "..."],
    zero_point: Float[Tensor, "..."] | None,
    qmin: int,
    qmax: int,
) -> Float[Tensor, "..."]:
    """Integer codes `clip(round(x / scale) + zero_point, qmin, qmax)`, kept in floating point.

    The division is a true one: multiplying by the reciprocal flips codes at the boundaries.

    Args:
        x: Real values.
        scale: Size of one step in the units of `x`, positive; broadcasts against `x`.
        zero_point: Code of the real value zero; None for a symmetric grid. A fraction is legal: it
            leaves a partial step at either end of the grid, and codes that are no integers.
        qmin: Smallest code.
        qmax: Largest code.

    Example:
        >>> quantize(torch.tensor([0.3, -9.0]), torch.tensor(0.5), None, -2, 1)
        tensor([ 1., -2.])
    """
    codes = (x / scale).round_()
    return (codes if zero_point is None else codes.add_(zero_point)).clamp_(qmin, qmax)


def dequantize(
    codes: Float[Tensor, "..."],
    scale: Float[Tensor, "..."],
    zero_point: Float[Tensor, "..."] | None,
) -> Float[Tensor, "..."]:
    """Real values `(codes - zero_point) * scale` of integer codes."""
    return codes * scale if zero_point is None else (codes - zero_point) * scale


class _FakeQuantize(Function):
    """Quantize and map back, with the gradients of LSQ (Esser et al. 2020, Eq. 3).

    With v = x / s + z, inside meaning qmin < v < qmax, and c the rounded and clipped code:

        d out / d x = 1 inside, 0 outside
        d out / d s = (c - z) - (v - z) inside,  c - z outside

    The sum over a scale's elements of grad * (c - z) is that of grad * out, divided by s.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        qmin: int,
        qmax: int,
        grad_factor: float,
    ) -> Tensor:
        v = x / scale
        codes = v.round()
        if zero_point is not None:
            codes.add_(zero_point)
            v.add_(zero_point)
        codes.clamp_(qmin, qmax)
        out = (codes if zero_point is None else codes.sub_(zero_point)).mul_(scale)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(v, out, scale, zero_point)
            ctx.bounds = (qmin, qmax, grad_factor)
        else:  # one byte a value in place of eight
            _hardtanh_backward.grad_input(torch.ones_like(scale), v, qmin, qmax, grad_input=v)
            ctx.save_for_backward(v.to(torch.int8))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        if not ctx.needs_input_grad[1]:
            (inside,) = ctx.saved_tensors
            return inside.to(grad.dtype).mul_(grad), None, None, None, None, None
        v, out, scale, zero_point = ctx.saved_tensors
        qmin, qmax, grad_factor = ctx.bounds
        grad_x = _hardtanh_backward(grad, v, qmin, qmax)
        steps = v if zero_point is None else v - zero_point
        codes_term = (grad * out).sum_to_size(scale.shape) / scale
        value_term = (grad_x * steps).sum_to_size(scale.shape)
        return grad_x, (codes_term - value_term) * grad_factor, None, None, None, None


def fake_quantize(
    x: Float[Tensor, "*shape"],
    scale: Float[Tensor, "..."],
    zero_point: Float[Tensor, "..."] | None,
    qmin: int,
    qmax: int,
    grad_factor: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """Quantize to codes in [qmin, qmax] and map back: `dequantize(quantize(x))`.

    The gradient passes straight through inside the grid and is zero outside it; the scale, where
    it requires a gradient, receives the one of LSQ, multiplied by `grad_factor`.

    Example:
        >>> fake_quantize(torch.tensor([0.3, -9.0]), torch.tensor(0.5), None, -2, 1)
        tensor([ 0.5000, -1.0000])
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)):
        codes = quantize(x, scale, zero_point, qmin, qmax)
        return (codes if zero_point is None else codes.sub_(zero_point)).mul_(scale)
    return _FakeQuantize.apply(x, scale, zero_point, qmin, qmax, grad_factor)  # type: ignore[return-value]


def look_up(codes: Shaped[Tensor, "*shape"], table: Float[Tensor, " codes"]) -> Tensor:
    """Real values of codes, by a table of the value of each.

    Example:
        >>> look_up(torch.tensor([1, 0]), torch.tensor([0.5, 0.25]))
        tensor([0.2500, 0.5000])
    """
    return table.index_select(0, codes.int().flatten()).view(codes.shape)


class _TableQuantize(Function):
    """Values of a table for the codes of `x`; straight through inside, as in `_FakeQuantize`.

    With y = s * level(code(x / s)), inside meaning 0 < x < s:

        d y / d x = 1 inside, 0 outside
        d y / d s = (y - x) / s inside,  y / s outside
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, codes: Tensor, levels: Tensor, grad_factor: float
    ) -> Tensor:
        out = look_up(codes, levels * scale)
        ctx.save_for_backward(x, out, scale)
        ctx.grad_factor = grad_factor
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, out, scale = ctx.saved_tensors
        grad_x = _hardtanh_backward(grad, x / scale, 0, 1)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None, None
        grad_scale = ((grad * out).sum() - (grad_x * x).sum()) / scale * ctx.grad_factor
        return grad_x, grad_scale, None, None, None


def table_quantize(
    x: Float[Tensor, "*shape"],
    scale: Float[Tensor, ""],
    codes: Float[Tensor, "*shape"],
    levels: Float[Tensor, " codes"],
    grad_factor: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """Values `scale * levels[codes]`, with the gradients of a quantizer of [0, scale].

    Args:
        x: Real values, what `codes` was computed from.
        scale: Upper end of the grid.
        codes: Index of each value's level, an integer kept in floating point.
        levels: The grid, in units of the scale.
        grad_factor: Multiplies the gradient of the scale.
    """
    return _TableQuantize.apply(x, scale, codes, levels, grad_factor)  # type: ignore[return-value]


class _StraightThrough(Function):
    """Another value forward; the gradient of `x` where `inside`, zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad if inside is None else grad * inside, None, None


def straight_through(
    x: Float[Tensor, "*shape"],
    out: Float[Tensor, "*shape"],
    inside: Bool[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """The values `out` with the gradient of `x`, which is cut where not `inside`.

    Args:
        x: Real values, what `out` was computed from.
        out: Their values on a grid.
        inside: Where the gradient passes; None lets all of it pass.
    """
    if not x.requires_grad:
        return out
    return _StraightThrough.apply(x, out, inside)  # type: ignore[return-value]


def code_dtype(qmin: int, qmax: int) -> torch.dtype:
    """Smallest integer dtype that holds the codes qmin to qmax."""
    for dtype in (torch.int8, torch.uint8, torch.int16):
        info = torch.iinfo(dtype)
        if info.min <= qmin and qmax <= info.max:
            return dtype
    return torch.int32


def boundary_distance(v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Distance of values in units of the step to the nearest rounding boundary, 0 to 0.5.

    Example:
        >>> boundary_distance(torch.tensor([1.0, 1.4, -0.5]))
        tensor([0.5000, 0.1000, 0.0000])
    """
    return 0.5 - (v - v.round()).abs()


def token_axes(x: Tensor, shape: tuple[int, ...]) -> list[int]:
    """Axes of `x`, besides the first, that an operand's trailing shape leaves open.

    Those are tokens or pixels; none for pooled features.

    Example:
        >>> token_axes(torch.zeros(8, 197, 384), (384,)), token_axes(torch.zeros(8, 384), (384,))
        ([1], [])
        >>> token_axes(torch.zeros(8, 6, 197, 64), (6, 1, 64))
        [2]
    """
    sizes = (1,) * (x.ndim - len(shape)) + shape
    return [axis for axis in range(1, x.ndim) if sizes[axis] == 1]

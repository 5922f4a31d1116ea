"""Binarization as pure functions, each with its forward formula and its surrogate gradient.

Provenance: the authors' code of related binary networks, read and restated: XNOR scale and clipped
estimator as in ReActNet (Liu et al. 2020) and the binary ViTs after it; the piecewise quadratic
estimator of Bi-Real Net (Liu et al. 2018). That BinaryViT uses these forms is a *reconstruction*.
"""

from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd import Function


def sign(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Sign with two values: +1 for x >= 0, zero included, else -1.

    Example:
        >>> sign(torch.tensor([-2.0, 0.0, 3.0]))
        tensor([-1.,  1.,  1.])
    """
    return (x >= 0).to(x.dtype).mul_(2).sub_(1)


def row_mean(w: Float[Tensor, " out *inner"]) -> Float[Tensor, " out *ones"]:
    """Mean over all axes but the first, which are kept with size 1."""
    return w.mean(dim=tuple(range(1, w.ndim)), keepdim=True)


def weight_of(
    signs: Shaped[Tensor, " out *inner"], scale: Float[Tensor, " out *ones"]
) -> Float[Tensor, " out *inner"]:
    """A weight with these signs, of whose rows the mean of magnitudes is the scale to the last bit.

    A mean of equal values rounds; some values of each row make up for it, one after another, since
    not every mean is reached by changing the same one.
    """
    weight = signs.to(scale.dtype).mul_(scale)
    rows = weight.reshape(len(weight), -1)
    for i in range(8):
        value = rows[:, i % rows.shape[1]]
        missing = (scale - row_mean(weight.abs())).reshape(len(rows))
        value += missing * value.sign() * (rows.shape[1] / 2)
    return weight


class _BinarizeWeight(Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, centred: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(centred)
        return sign(centred).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (centred,) = ctx.saved_tensors
        return grad * (centred.abs() <= 1), None, None


def binarize_weight(
    w: Float[Tensor, " out *inner"],
    centred: Float[Tensor, " out *inner"],
    scale: Float[Tensor, " out *ones"],
) -> Float[Tensor, " out *inner"]:
    """Binary weights, one positive scale for each output channel.

        forward    scale * sign(centred)
        backward   d w = grad * 1[|centred| <= 1]; the scale gets no gradient

    Args:
        w: Latent weight; receives the gradient.
        centred: The latent weight, minus its row mean where rows are centred.
        scale: Scale of each row, the mean of |w| (XNOR-Net).
    """
    return _BinarizeWeight.apply(w, centred.detach(), scale.detach())  # type: ignore[return-value]


class _BinarizeActivation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (2 - 2 * x.abs()).clamp_(min=0)


def binarize_activation(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Binary activations with the Bi-Real estimator.

        forward    sign(x)
        backward   2 + 2x on [-1, 0],  2 - 2x on (0, 1],  0 outside

    Example:
        >>> x = torch.tensor([-0.25, 2.0], requires_grad=True)
        >>> binarize_activation(x).sum().backward()
        >>> x.grad
        tensor([1.5000, 0.0000])
    """
    return _BinarizeActivation.apply(x)  # type: ignore[return-value]

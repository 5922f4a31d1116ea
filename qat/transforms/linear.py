"""Linear transforms of a layer's input that its weight undoes: `T(x) fold(W)^T = x W^T`.

`QuantLinear` applies them before its input quantizer; an initialiser puts them in place and folds
them into the weight, so that only the input's side remains to be computed. Their state is as small
as it can be: a factor a channel, a sign a channel, or two blocks and an order.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qat.transforms.rotation import hadamard_factors, signs_of_paley, sylvester


class Scaling(nn.Module):
    """A factor for each channel.

    Args:
        scale: The factors, none of them zero.
    """

    scale: Tensor

    def __init__(self, scale: Float[Tensor, " channels"]) -> None:
        super().__init__()
        self.register_buffer("scale", scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.scale

    def fold(self, weight: Tensor) -> Tensor:
        """Divide the weight's input channels."""
        return weight / self.scale


class Hadamard(nn.Module):
    """Random signs, then a Hadamard matrix, which is never stored.

    Args:
        signs: +1 or -1 for each channel, as integers.

    Raises:
        ValueError: If no Hadamard matrix of that size is known.
    """

    signs: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, signs: Int[Tensor, " channels"]) -> None:
        super().__init__()
        m, power = hadamard_factors(len(signs))
        self.register_buffer("signs", signs.to(torch.int8))
        for name, matrix in (("left", signs_of_paley(m)), ("right", sylvester(power))):
            matrix = (matrix / math.sqrt(len(matrix))).to(signs.device)
            self.register_buffer(name, matrix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate, by the two Kronecker factors of the matrix."""
        x = x * self.signs.to(x.dtype)
        if len(self.left) == 1:
            return x @ self.right.to(x.dtype)
        parts = x.unflatten(-1, (len(self.left), len(self.right)))
        return (self.left.T.to(x.dtype) @ parts @ self.right.to(x.dtype)).flatten(-2)

    fold = forward


class Dual(nn.Module):
    """Rotation of groups of channels, permutation, rotation of groups.

    Args:
        first: The block of the first rotation.
        order: The permutation: position to channel.
        second: The block of the second rotation.
    """

    first: Tensor
    order: Tensor
    second: Tensor

    def __init__(
        self,
        first: Float[Tensor, "size size"],
        order: Int[Tensor, " channels"],
        second: Float[Tensor, "size size"],
    ) -> None:
        super().__init__()
        for name, value in (("first", first), ("order", order), ("second", second)):
            self.register_buffer(name, value.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Rotate."""
        x = self._blocks(x, self.first)[..., self.order]
        return self._blocks(x, self.second)

    fold = forward

    @staticmethod
    def _blocks(x: Tensor, block: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, len(block))) @ block.to(x.dtype)).flatten(-2)


Transform = Scaling | Hadamard | Dual
PARTS: Mapping[str, type[Transform]] = {"scaling": Scaling, "hadamard": Hadamard, "dual": Dual}


class Transforms(nn.Sequential):
    """Transforms one after another, each by the name of its kind."""

    def __init__(self, *parts: Transform) -> None:
        super().__init__()
        names = {kind: name for name, kind in PARTS.items()}
        for part in parts:
            self.add_module(names[type(part)], part)

    @torch.no_grad()
    def fold(self, weight: Float[Tensor, "out channels"]) -> Float[Tensor, "out channels"]:
        """The weight that undoes all of them, computed in double precision."""
        folded = weight.double()
        for part in copy.deepcopy(self).double():
            folded = part.fold(folded)  # type: ignore[operator]
        return folded.to(weight.dtype)

    @staticmethod
    def like(state: Mapping[str, Any], prefix: str) -> "Transforms | None":
        """Transforms with the state below a prefix of a checkpoint; None where there is none."""
        parts = []
        for name, kind in PARTS.items():
            below = f"{prefix}{name}."
            found = {k[len(below) :]: v for k, v in state.items() if k.startswith(below)}
            if found:
                parts.append(kind(**found))
        return Transforms(*parts) if parts else None

"""RPReLU and the extra shortcuts that binary networks put around each binary layer.

ReActNet (Liu et al. 2020, https://arxiv.org/abs/2003.03488) gives RPReLU and the shortcuts; their
placement in a transformer follows what the code of Le and Li's ReActNet-DeiT baseline does. Whether
the BinaryViT of Xiao et al. has them is unknown, so the set is a switch and a *reconstruction*:

    linear   y = RPReLU(norm(linear(x)) + shortcut(x))
    context  y = norm(A v) + q + k + v
    MLP      the activation between its two layers is dropped: RPReLU takes its place

The shortcut of a layer that widens repeats channels, one that narrows averages groups of them.
In phase FLOAT all of this is bypassed, and the model is the original one.
"""

import torch
from einops import reduce
from jaxtyping import Float
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from qat import Phase, Quantizer
from qat.layers import through


class RPReLU(nn.Module):
    """PReLU with a learned shift before and after: `PReLU(x - before) + after`, for each channel.

    Args:
        dim: Number of channels, the last axis.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.zeros(dim))
        self.after = nn.Parameter(torch.zeros(dim))
        self.slope = nn.Parameter(torch.full((dim,), 0.25))

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Shift, bend, shift."""
        # F.prelu takes its channels from axis 1.
        rows = (x - self.before).flatten(0, -2)
        return F.prelu(rows, self.slope).view_as(x) + self.after


def shortcut(x: Float[Tensor, "... inputs"], out_features: int) -> Float[Tensor, "... outputs"]:
    """Carry features past a layer: repeat them to widen, average groups of them to narrow.

    Example:
        >>> shortcut(torch.tensor([1.0, 3.0]), 4), shortcut(torch.tensor([1.0, 3.0]), 1)
        (tensor([1., 3., 1., 3.]), tensor([2.]))
    """
    in_features = x.shape[-1]
    if out_features >= in_features:
        return torch.cat([x] * (out_features // in_features), -1)
    return reduce(x, "... (outputs group) -> ... outputs", "mean", outputs=out_features)


class ReactLinear(nn.Module):
    """A quantized linear layer with normalization, shortcut and RPReLU.

    Args:
        linear: The float layer; its parameters are taken over.
        weight_quantizer: Quantizer of the weight.
        input_quantizer: Quantizer of the input.

    Raises:
        ValueError: If neither of the layer's two widths is a multiple of the other.
    """

    packed_role = "react"
    bias: nn.Parameter | None

    def __init__(
        self, linear: nn.Linear, weight_quantizer: Quantizer, input_quantizer: Quantizer | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        wide, narrow = (
            max(self.in_features, self.out_features),
            min(self.in_features, self.out_features),
        )
        if wide % narrow:
            raise ValueError(
                f"no shortcut from {self.in_features} to {self.out_features} features, neither is "
                "a multiple of the other; keep this layer in float by an earlier rule"
            )
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        self.norm = nn.LayerNorm(linear.out_features)
        self.act = RPReLU(linear.out_features)

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """The float layer in phase FLOAT and OBSERVE, the binary block in phase QUANTIZE."""
        return self.with_bias(x, self.bias)

    def with_bias(
        self, x: Float[Tensor, "... inputs"], bias: Tensor | None
    ) -> Float[Tensor, "... outputs"]:
        """The same with another bias, for modules that use the layer's weight themselves."""
        weight = self.weight_quantizer(self.weight)
        y = F.linear(through(self.input_quantizer, x), weight, bias)
        if self.weight_quantizer.phase is not Phase.QUANTIZE:
            return y
        return self.act(self.norm(y) + shortcut(x, self.out_features))


class ContextShortcut(nn.Module):
    """The context of attention, normalized, plus q + k + v; see `qat.attention.attend`.

    Args:
        head_dim: Width of a head.
    """

    packed_role = "context"

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(head_dim)

    def forward(
        self,
        x: Float[Tensor, "batch heads tokens dim"],
        q: Float[Tensor, "batch heads tokens dim"],
        k: Float[Tensor, "batch heads tokens dim"],
        v: Float[Tensor, "batch heads tokens dim"],
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """`norm(x) + q + k + v`."""
        return self.norm(x) + q + k + v


class ReactMlp(nn.Module):
    """timm's `Mlp` whose activation gives way to the RPReLU of its first layer.

    Args:
        mlp: The float module; its layers are taken over.
    """

    packed_role = "mlp"

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = mlp.fc1, mlp.act, mlp.drop1
        self.norm, self.fc2, self.drop2 = mlp.norm, mlp.fc2, mlp.drop2

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Both layers, with the float activation only where the first layer is in float."""
        x = self.fc1(x)
        bends = (
            isinstance(self.fc1, ReactLinear) and self.fc1.weight_quantizer.phase is Phase.QUANTIZE
        )
        x = self.drop1(x if bends else self.act(x))
        return self.drop2(self.fc2(self.norm(x)))

"""Layers whose operands pass through quantizers.

They own no arithmetic and keep the float module's parameter names, so that a float `state_dict`
loads with only quantizer keys missing. None in place of a quantizer means full precision.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qat.intercept import Intercepted, new
from qat.quantizers import Phase, Quantizer
from qat.trace import LINEARS
from qat.transforms import Transforms


def through(quantizer: nn.Module | None, x: Tensor) -> Tensor:
    """Pass an operand through its quantizer, or what stands in for it, or as it is."""
    return x if quantizer is None else quantizer(x)


class QuantLinear(nn.Module):
    """A linear layer with a quantized weight and input.

    Args:
        linear: The float layer; its parameters are taken over, not copied.
        weight_quantizer: Quantizer of the weight (out_features, in_features).
        input_quantizer: Quantizer of the input (..., in_features).
    """

    bias: nn.Parameter | None
    input_transform: Transforms | None

    def __init__(
        self,
        linear: nn.Linear,
        weight_quantizer: Quantizer | None = None,
        input_quantizer: Quantizer | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        self.register_module("input_transform", None)

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """Product of the quantized operands plus the float bias."""
        return self.with_bias(x, self.bias)

    def with_bias(
        self, x: Float[Tensor, "... inputs"], bias: Tensor | None
    ) -> Float[Tensor, "... outputs"]:
        """The same with another bias, for modules that use the layer's weight themselves."""
        weight = through(self.weight_quantizer, self.weight)
        x = through(self.input_transform, x)
        return F.linear(through(self.input_quantizer, x), weight, bias)

    @torch.no_grad()
    def transform_(self, transform: Transforms) -> None:
        """Transform the input before it is quantized, and undo that in the weight.

        Raises:
            ValueError: If the layer has a transform already.
        """
        if self.input_transform is not None:
            raise ValueError(
                "the input is transformed already; initialise a freshly converted model"
            )
        self.weight.copy_(transform.fold(self.weight))
        self.input_transform = transform

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Make room for what an initialiser gave to the layer: a bias, transforms of the input."""
        if self.bias is None and f"{prefix}bias" in state_dict:
            self.bias = nn.Parameter(torch.zeros_like(self.weight[:, 0]))
        if self.input_transform is None:
            self.input_transform = Transforms.like(state_dict, f"{prefix}input_transform.")
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantConv2d(nn.Module):
    """A 2-d convolution with a quantized weight and input.

    Args:
        conv: The float layer; its parameters are taken over, not copied.
        weight_quantizer: Quantizer of the weight (out, in / groups, height, width).
        input_quantizer: Quantizer of the input (batch, in, height, width).

    Raises:
        ValueError: If the layer pads otherwise than with zeros.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        conv: nn.Conv2d,
        weight_quantizer: Quantizer | None = None,
        input_quantizer: Quantizer | None = None,
    ) -> None:
        super().__init__()
        if conv.padding_mode != "zeros":
            raise ValueError(
                f"QuantConv2d pads with zeros only, the layer pads with '{conv.padding_mode}'; "
                "keep it in float by a plan rule without specs"
            )
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size = conv.kernel_size
        self.stride = conv.stride
        self.padding: str | tuple[int, ...] = conv.padding
        self.dilation, self.groups = conv.dilation, conv.groups
        self.weight = conv.weight
        self.register_parameter("bias", conv.bias)  # type: ignore[arg-type]
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch out oh ow"]:
        """Convolution of the quantized operands plus the float bias."""
        weight = through(self.weight_quantizer, self.weight)
        x = through(self.input_quantizer, x)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class QuantLayer(Intercepted):
    """A layer with a forward pass of its own, such as one that standardizes its weight.

    The operands of the first linear function or convolution that it calls pass through the
    quantizers. So that of the weight sees what is multiplied, not the parameter.
    """

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None

    def qat_calls(self) -> TorchFunctionMode:
        """Sends operands to the quantizers."""
        return _Operands(self)


def quant_layer(
    layer: nn.Module, weight_quantizer: Quantizer | None, input_quantizer: Quantizer | None
) -> nn.Module:
    """A twin of a layer of any class, which keeps its forward pass; see `QuantLayer`.

    Args:
        layer: The float layer; its parameters are taken over, not copied.
        weight_quantizer: Quantizer of its weight.
        input_quantizer: Quantizer of its input.
    """
    twin: Any = new(QuantLayer, type(layer))
    twin.__dict__.update(layer.__dict__, _modules=dict(layer._modules))
    twin.weight_quantizer, twin.input_quantizer = weight_quantizer, input_quantizer
    return twin


class _Operands(TorchFunctionMode):
    """Sends the operands of the first product of a layer to its quantizers."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.layer, self.done = layer, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            if func in LINEARS and not self.done:
                self.done = True
                x, weight, *rest = args
                x = through(self.layer.input_quantizer, x)
                args = (x, through(self.layer.weight_quantizer, weight), *rest)
            return func(*args, **(kwargs or {}))


class QuantMatmul(nn.Module):
    """A product of two activations, both quantized.

    Args:
        left_quantizer: Quantizer of the left operand, such as (batch, heads, rows, inner).
        right_quantizer: Quantizer of the right operand, such as (batch, heads, inner, columns),
            which it sees as the transpose if `transpose_right` is set.
        transpose_right: Multiply by the transpose of the right operand, as in Q K^T.
    """

    def __init__(
        self,
        left_quantizer: Quantizer | None = None,
        right_quantizer: Quantizer | None = None,
        *,
        transpose_right: bool = False,
    ) -> None:
        super().__init__()
        self.left_quantizer = left_quantizer
        self.right_quantizer = right_quantizer
        self.transpose_right = transpose_right

    @property
    def phase(self) -> Phase:
        """The phase of its quantizers: of the first that is not FLOAT, if one is not."""
        present = (self.left_quantizer, self.right_quantizer)
        phases = (q.phase for q in present if q is not None)
        return next((phase for phase in phases if phase is not Phase.FLOAT), Phase.FLOAT)

    def forward(
        self,
        left: Float[Tensor, "..."],
        right: Float[Tensor, "..."],
        multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
    ) -> Float[Tensor, "..."]:
        """Product of the quantized operands, by another function than `matmul` where one is given.

        Args:
            left: Left operand.
            right: Right operand, or its transpose if `transpose_right` is set.
            multiply: Multiplies the quantized operands.
        """
        left = through(self.left_quantizer, left)
        right = through(self.right_quantizer, right)
        return multiply(left, right.transpose(-2, -1) if self.transpose_right else right)


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Quantizer]]:
    """Name of the layer, latent weight and quantizer of every layer with a quantized weight."""
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if isinstance(quantizer, Quantizer):
            yield name, module.weight, quantizer  # type: ignore[misc]

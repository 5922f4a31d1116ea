"""Binary layers inside torch by the native kernels, for inference.

`native_` replaces the binary linear layers of a `plain` model by ones that multiply bits. Their
product is the operator `lowbit::binary_linear`, which `torch.compile` keeps as one call. The shift
before the sign stays in torch, so the signs are those of the simulation.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, library, nn

from binaryvit.quantizers import BinaryActivation, BinaryWeight
from qat import Phase, kernels
from qat.kernels.products import Prepared
from qat.layers import QuantLinear


@library.custom_op("lowbit::binary_linear", mutates_args=(), device_types="cpu")
def binary_linear(
    x: Tensor, panels: Tensor, scale: Tensor, bias: Tensor | None, kind: str
) -> Tensor:
    """`scale * sign(x) sign(weight)^T + bias`, sign(0) being +1.

    Args:
        x: Values (..., k), float32.
        panels: The weight, as `prepare_binary` lays it out.
        scale: Scale of each of n outputs.
        bias: Bias of each, or None.
        kind: What it was laid out for.
    """
    run, k, n = kernels.operations(), x.shape[-1], len(scale)
    zero = x.new_zeros(1, k).numpy()
    signs = run["sign_pack"](x.reshape(1, -1, k).numpy(), zero)[0]
    weight = Prepared(kind, n, k, panels.numpy())
    y = run["binary_linear"](
        signs, weight, k, scale.numpy(), None if bias is None else bias.numpy()
    )
    return torch.from_numpy(y).reshape(*x.shape[:-1], n)


@binary_linear.register_fake
def _(x: Tensor, panels: Tensor, scale: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(scale))


class NativeLinear(nn.Module):
    """A binary linear layer that multiplies bits; it does not learn.

    Args:
        layer: The simulated layer.
    """

    panels: Int[Tensor, "rows words"]
    scale: Float[Tensor, " outputs"]
    bias: Float[Tensor, " outputs"] | None

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        weight, inputs = layer.weight_quantizer, layer.input_quantizer
        assert isinstance(weight, BinaryWeight) and isinstance(inputs, BinaryActivation)
        run, codes = kernels.operations(), weight.codes(layer.weight)
        positive = (codes.values > 0).float().numpy()
        bits = run["sign_pack"](positive[None], positive[:1] * 0 + 0.5)[0]
        prepared = run["prepare_binary"](bits, layer.in_features)
        self.kind, self.shift = prepared.kind, inputs.shift
        self.register_buffer("panels", torch.from_numpy(prepared.panels.view("int64")))
        self.register_buffer("scale", codes.scale.flatten().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """Product of signs, scaled, plus the bias."""
        return binary_linear(self.shift(x), self.panels, self.scale, self.bias, self.kind)


def native_(model: nn.Module) -> list[str]:
    """Replace the binary linear layers of a `plain` model, in place, for inference on a CPU.

    Returns:
        The names of the layers.

    Raises:
        ValueError: If the model has none, or there are no kernels.
    """
    if not kernels.operations():
        raise ValueError(
            f"there are no native kernels here; unset LOWBIT_KERNELS, or {kernels.HOW_TO_BUILD}"
        )
    names = [name for name, module in model.named_modules() if _is_binary(module)]
    if not names:
        raise ValueError("the model has no plain linear layer with binary weight and input")
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        model.set_submodule(name, NativeLinear(layer))
    return names


def _is_binary(module: nn.Module) -> bool:
    return (
        isinstance(module, QuantLinear)
        and isinstance(module.weight_quantizer, BinaryWeight)
        and isinstance(module.input_quantizer, BinaryActivation)
        and module.weight_quantizer.phase is Phase.QUANTIZE
        and module.input_transform is None
    )

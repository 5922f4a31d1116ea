"""Parameters, bytes and operations of a model under its plan, by one stated formula.

    MACs    multiply-accumulates of an image in every product: linear, convolution, Q K^T, A V
    BOPs    sum over products of MACs * bits of one operand * bits of the other; float counts 32
    bytes   weights at their bits, plus 32 bits for each weight scale and zero point, and for every
            other parameter and persistent floating-point buffer; signs and orders are not counted

Additions of biases, normalization, softmax and activation functions are not counted as operations.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qat.models import example_inputs
from qat.quantizers import Phase, Quantizer, set_phase
from qat.transforms import Transforms

FLOAT_BITS = 32
TRANSFORM = "transform"
"""Kind of a site that transforms a layer's input, in float."""

Width = int | float
"""Bits of an operand; a fraction where the mean over tokens is none."""


@dataclass(frozen=True)
class Site:
    """One matrix product of a model.

    Attributes:
        name: Name of the module; products of attention end in `.qk` and `.av`.
        kind: Class name of the module, or `product`.
        macs: Multiply-accumulates for one image.
        bits: Widths of the two operands: input and weight, or left and right of a product; means
            over tokens, and so perhaps fractions, where tokens differ.
        num_weights: Elements of the weight, 0 for a product.
        num_scales: Scales and zero points of the weight.
    """

    name: str
    kind: str
    macs: int
    bits: tuple[Width, Width]
    num_weights: int = 0
    num_scales: int = 0

    @property
    def bops(self) -> int:
        """Bit operations for one image."""
        return round(self.macs * self.bits[0] * self.bits[1])

    @property
    def low_bit(self) -> bool:
        """True if both operands have fewer than 16 bits."""
        return max(self.bits) < 16

    @property
    def precision(self) -> str:
        """Field notation: `w4a8` is 4-bit weights, 8-bit activations; `float` at 32 bits each."""
        if self.bits == (FLOAT_BITS, FLOAT_BITS):
            return "float"
        left, right = (f"{bits:.4g}" for bits in self.bits)
        return f"w{right}a{left}" if self.num_weights else f"a{left}a{right}"


@dataclass(frozen=True)
class Cost:
    """Cost of a model.

    Attributes:
        sites: Every matrix product.
        num_other: Parameters and buffers, by group, that no site's weight holds: `position`,
            `norm`, `bias`, `quantizer`, `transform` and `other`; 32 bits each.
        uncounted: Modules that own a weight but are of no known product type; their operations
            are missing.
    """

    sites: tuple[Site, ...]
    num_other: dict[str, int]
    uncounted: tuple[str, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return sum(site.macs for site in self.sites)

    @property
    def bops(self) -> int:
        """Bit operations for one image."""
        return sum(site.bops for site in self.sites)

    @property
    def num_parameters(self) -> int:
        """Weights and everything beside them."""
        return sum(site.num_weights for site in self.sites) + sum(self.num_other.values())

    @property
    def size_bytes(self) -> float:
        """Size of all state, by the formula of this module."""
        weights = sum(s.num_weights * s.bits[1] + s.num_scales * FLOAT_BITS for s in self.sites)
        return (weights + sum(self.num_other.values()) * FLOAT_BITS) / 8

    @property
    def coverage_macs(self) -> float:
        """Share of the MACs whose operands both have fewer than 16 bits."""
        return sum(site.macs for site in self.sites if site.low_bit) / self.macs


def cost(model: nn.Module) -> Cost:
    """Cost of one image through a timm model, converted or not. Touches no data.

    The model is traced on the meta device, so nothing is computed.
    """
    traced = copy.deepcopy(model).to("meta").eval()
    set_phase(traced, Phase.FLOAT)
    sites: dict[str, list[Site]] = {}

    def record(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for site in _sites(name, module, inputs[0], output):
                # A module that runs twice computes twice and is stored once.
                again = name in sites and site.num_weights > 0
                site = replace(site, num_weights=0, num_scales=0) if again else site
                sites.setdefault(name, []).append(site)

        return module.register_forward_hook(hook)

    for name, module in traced.named_modules():
        if _is_layer(module) or _is_attention(module):
            record(name, module)
    with torch.no_grad():
        traced(*example_inputs(model, "meta"))
    found = tuple(site for group in sites.values() for site in group)
    other, uncounted = _other(traced, {site.name for site in found})
    return Cost(found, other, uncounted)


def activation_bytes(model: nn.Module) -> int:
    """Bytes that training keeps for the backward pass of one image, beside the parameters.

    Counted on a real forward pass of a zero image in training mode, each storage once. The phase
    is QUANTIZE where the model is converted.
    """
    probe = copy.deepcopy(model).cpu().train()
    set_phase(probe, Phase.QUANTIZE)
    owned = {p.untyped_storage().data_ptr() for p in (*probe.parameters(), *probe.buffers())}
    kept: dict[int, Tensor] = {}  # keeps the tensors alive, so that addresses stay distinct

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in owned:
            kept[address] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = probe(*example_inputs(model))
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d) or hasattr(module, "weight_quantizer")


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "qkv") and hasattr(module, "num_heads")


def _bits(quantizer: Any) -> Width:
    return quantizer.mean_bits if isinstance(quantizer, Quantizer) else FLOAT_BITS


def _sites(name: str, module: Any, x: Tensor, output: Tensor) -> list[Site]:
    if _is_layer(module):
        weight, quantizer = module.weight, getattr(module, "weight_quantizer", None)
        num_scales = 0
        if isinstance(quantizer, Quantizer):
            codes = quantizer.codes(weight)
            num_scales = codes.scale.numel()
            num_scales += 0 if codes.zero_point is None else codes.zero_point.numel()
            num_scales += quantizer.num_extra_scales
        bits = (_bits(getattr(module, "input_quantizer", None)), _bits(quantizer))
        macs = output.numel() * weight[0].numel()
        kind = type(module).__name__
        sites = [Site(name, kind, macs, bits, weight.numel(), num_scales)]
        if (transform := getattr(module, "input_transform", None)) is not None:
            macs = x.numel() * transform.macs_per_feature
            sites.append(Site(f"{name}.input_transform", TRANSFORM, macs, (FLOAT_BITS, FLOAT_BITS)))
        return sites
    windows, tokens, _ = x.shape
    macs = windows * tokens * tokens * module.qkv.out_features // 3
    products = []
    for product in ("qk", "av"):
        matmul = getattr(module, product, None)
        left = _bits(getattr(matmul, "left_quantizer", None))
        right = _bits(getattr(matmul, "right_quantizer", None))
        products.append(Site(f"{name}.{product}", "product", macs, (left, right)))
    return products


def _other(model: nn.Module, sites: set[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    groups: tuple[str, ...] = ("position", "norm", "bias", "quantizer", "transform", "other")
    counts: dict[str, int] = dict.fromkeys(groups, 0)
    uncounted = []
    seen: set[int] = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        owner, _, leaf = key.rpartition(".")
        module = model.get_submodule(owner)
        path = [model.get_submodule(owner[:i]) for i in _prefixes(owner)]
        if leaf == "weight" and owner in sites:
            continue
        if any(isinstance(part, Quantizer) for part in path):
            # Scales of weights are counted with their site.
            counts["quantizer"] += 0 if "weight_quantizer" in key else tensor.numel()
        elif any(isinstance(part, Transforms) for part in path):
            counts["transform"] += tensor.numel()
        elif "norm" in type(module).__name__.lower():
            counts["norm"] += tensor.numel()
        elif leaf == "bias":
            counts["bias"] += tensor.numel()
        elif leaf.endswith(("pos_embed", "token", "position_bias_table")):
            counts["position"] += tensor.numel()
        else:
            counts["other"] += tensor.numel()
            if tensor.ndim > 1 and not isinstance(module, nn.Embedding):  # a look-up is free
                uncounted.append(owner or key)
    return counts, tuple(dict.fromkeys(uncounted))


def _prefixes(name: str) -> list[int]:
    """Ends of all prefixes of a dotted name that are module names, itself included."""
    return [i for i, char in enumerate(name) if char == "."] + [len(name)]

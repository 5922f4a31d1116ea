"""Parameters, bytes and operations of a model under its plan, by one stated formula.

    MACs    multiply-accumulates of an image in every product: linear, convolution, Q K^T, A V; half
            of what `torch.utils.flop_counter` counts
    BOPs    sum over products of MACs * bits of one operand * bits of the other; float counts 32
    bytes   weights at their bits, plus 32 bits for each weight scale and zero point, and for every
            other parameter and persistent floating-point buffer; signs and orders are not counted

Additions of biases, normalization, softmax and activation functions are not counted as operations.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.models import example_inputs
from qat.products import groups
from qat.quantizers import Phase, Quantizer, set_phase
from qat.trace import MULTIHEAD, REACHABLE, Call, trace
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
        name: Name of the module; products of attention end in `.qk` and `.av`, others that have no
            weight in `.product`.
        kind: Class name of the module, `product`, or the function that cannot be quantized.
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
        uncounted: Modules whose operations are not all counted, such as an LSTM, whose kernel shows
            none: then the coverage is at most what it says.
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
    """Cost of one image through a model, converted or not. Touches no data.

    The model is traced on the meta device, so nothing is computed. Every operation that torch's
    FLOP counter counts is part of a site; what no quantizer reaches is in float, by name.
    """
    found = trace(model, example_inputs(model))
    names = {owner: _products(owner, calls) for owner, calls in found.owners().items()}
    sites: list[Site] = []
    stored: set[str] = set()
    for call in found.calls:
        layer, transforms, _ = call.owner.partition(".input_transform")
        if transforms:
            name = f"{layer}{transforms}"
            sites.append(Site(name, TRANSFORM, sum(call.macs), (FLOAT_BITS, FLOAT_BITS)))
        elif call.layer is not None:
            sites.append(_layer_site(model, call, stored))
        elif call.function is MULTIHEAD:
            sites += _multihead_sites(model, call, stored)
        elif sum(call.macs):
            named = (
                names.get(call.owner, {}).get(call.number) if call.function in REACHABLE else None
            )
            sites += _product_sites(model, call, named)
    return Cost(tuple(sites), _other(model, {site.name for site in sites}), found.uncounted)


def _products(owner: str, calls: list[Call]) -> dict[int, list[str]]:
    """For the number of each call, the names of its products."""
    found: dict[int, list[str]] = {}
    for group in groups(owner, calls):
        products = [f"{group.name}.{child.partition('_')[0]}" for child in group.children]
        if len(group.calls) == 1:
            found[group.calls[0]] = products
        else:
            found |= {call: [one] for call, one in zip(group.calls, products, strict=True)}
    return found


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


def _bits(module: Any, quantizer: str) -> Width:
    found = getattr(module, quantizer, None)
    return found.mean_bits if isinstance(found, Quantizer) else FLOAT_BITS


def _layer_site(model: nn.Module, call: Call, stored: set[str]) -> Site:
    """The product of a layer."""
    name = str(call.layer)
    module: Any = model.get_submodule(name)
    left, right = _bits(module, "input_quantizer"), _bits(module, "weight_quantizer")
    if call.layer != call.owner:  # used by a module that may pass the layer's quantizers by
        owner = model.get_submodule(call.owner)
        paths = (f"{call.owner}.{path}".lstrip(".") for path in getattr(owner, "qat_bypassed", ()))
        left, right = (left, right) if name in paths else (FLOAT_BITS, FLOAT_BITS)
    return _weighted(name, module, sum(call.macs), (left, right), stored)


def _multihead_sites(model: nn.Module, call: Call, stored: set[str]) -> list[Site]:
    """Torch's multi-head attention, one function: projections, both products, output layer."""
    *projections, qk, av, output = call.macs
    module: Any = model.get_submodule(call.owner)
    bits = _bits(module, "input_quantizer"), _bits(module, "weight_quantizer")
    sites = [_weighted(call.owner, module, sum(projections), bits, stored)]
    for child, macs in (("qk", qk), ("av", av)):
        sites.append(_product_site(f"{call.owner}.{child}", macs, getattr(module, child, None)))
    layer: Any = module.out_proj
    bits = _bits(layer, "input_quantizer"), _bits(layer, "weight_quantizer")
    return [*sites, _weighted(f"{call.owner}.out_proj", layer, output, bits, stored)]


def _weighted(
    name: str, module: Any, macs: int, bits: tuple[Width, Width], stored: set[str]
) -> Site:
    """A product with a weight; one that runs twice computes twice and is stored once."""
    kind = type(module).__name__
    if name in stored:
        return Site(name, kind, macs, bits)
    stored.add(name)
    weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
    num_scales, quantizer = 0, getattr(module, "weight_quantizer", None)
    if isinstance(quantizer, Quantizer):
        codes = quantizer.codes(weight.detach())
        num_scales = codes.scale.numel() + quantizer.num_extra_scales
        num_scales += 0 if codes.zero_point is None else codes.zero_point.numel()
    return Site(name, kind, macs, bits, weight.numel(), num_scales)


def _product_sites(model: nn.Module, call: Call, products: list[str] | None) -> list[Site]:
    """Products of activations; what cannot be quantized is in float, under its owner's name."""
    if products is None or len(products) != len(call.macs):
        kind = getattr(call.function, "__name__", "unknown")
        bits = FLOAT_BITS, FLOAT_BITS
        return [Site(call.owner or "(the model itself)", kind, sum(call.macs), bits)]
    module = model.get_submodule(call.owner)
    sent = getattr(module, "qat_sites", ())[call.number : call.number + 1]
    children = sent[0].children if sent and sent[0] is not None else (None,) * len(products)
    return [
        _product_site(name, macs, child and getattr(module, child))
        for name, child, macs in zip(products, children, call.macs, strict=True)
    ]


def _product_site(name: str, macs: int, matmul: Any) -> Site:
    bits = _bits(matmul, "left_quantizer"), _bits(matmul, "right_quantizer")
    return Site(name, "product", macs, bits)


def _other(model: nn.Module, sites: set[str]) -> dict[str, int]:
    groups: tuple[str, ...] = ("position", "norm", "bias", "quantizer", "transform", "other")
    counts: dict[str, int] = dict.fromkeys(groups, 0)
    seen: set[int] = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        owner, _, leaf = key.rpartition(".")
        module = model.get_submodule(owner)
        path = [model.get_submodule(owner[:i]) for i in _prefixes(owner)]
        if leaf in ("weight", "in_proj_weight") and owner in sites:
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
    return counts


def _prefixes(name: str) -> list[int]:
    """Ends of all prefixes of a dotted name that are module names, itself included."""
    return [i for i, char in enumerate(name) if char == "."] + [len(name)]

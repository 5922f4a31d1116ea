"""The network of a packed file, found in a model; what the runtime cannot run is refused."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from timm.layers.patch_embed import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from qat.intercept import Intercepted
from qat.layers import QuantConv2d, QuantLinear
from qat.packed.network import OPERANDS, Network
from qat.quantizers import Quantizer

LINEARS = (nn.Linear, QuantLinear)
NORMS = (nn.LayerNorm, LayerNorm)
IDLE = (nn.Identity, nn.Dropout, DropPath)
KNOWN: Mapping[str, tuple[type, ...]] = {
    "": (VisionTransformer, VisionTransformerDistilled),
    "patch_embed": (PatchEmbed,),
    "patch_embed.proj": (nn.Conv2d, QuantConv2d),
    "norm_pre": NORMS,
    "blocks": (nn.Sequential,),
    "blocks.#": (Block,),
    "blocks.#.norm1": NORMS,
    "blocks.#.norm2": NORMS,
    "blocks.#.attn": (Attention,),
    "blocks.#.attn.qkv": LINEARS,
    "blocks.#.attn.q_norm": NORMS,
    "blocks.#.attn.k_norm": NORMS,
    "blocks.#.attn.norm": NORMS,
    "blocks.#.attn.proj": LINEARS,
    "blocks.#.ls1": (LayerScale,),
    "blocks.#.ls2": (LayerScale,),
    "blocks.#.mlp": (Mlp,),
    "blocks.#.mlp.fc1": LINEARS,
    "blocks.#.mlp.act": (nn.GELU,),
    "blocks.#.mlp.norm": NORMS,
    "blocks.#.mlp.fc2": LINEARS,
    "norm": NORMS,
    "fc_norm": NORMS,
    "head": LINEARS,
    "head_dist": LINEARS,
}
"""What may stand at each place of a model, `#` being the number of a block."""
ROLES = {
    "react": ("blocks.#.attn.qkv", "blocks.#.attn.proj", "blocks.#.mlp.fc1", "blocks.#.mlp.fc2")
}
INSTEAD = "export it to ONNX instead"


def describe_network(model: nn.Module) -> Network:
    """What a packed file says of a model.

    Raises:
        ValueError: Naming the first part that the runtime does not know.
    """
    if type(model) not in KNOWN[""]:
        raise ValueError(
            f"a packed file holds a ViT or DeiT of timm, not a {type(model).__name__}; {INSTEAD}"
        )
    for name, module in _parts(model):
        _check(name, module)
    vit: Any = model
    blocks = [f"blocks.{i}" for i in range(len(vit.blocks))]
    layers = [name for name, module in model.named_modules() if _role(module) == "react"]
    contexts = [
        name.rpartition(".")[0]
        for name, module in model.named_modules()
        if _role(module) == "context"
    ]
    _check_react(model, blocks)
    network = Network(
        image=(vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size),
        patch=tuple(vit.patch_embed.patch_size),
        depth=len(blocks),
        heads=vit.blocks[0].attn.num_heads,
        prefix=_prefix(vit),
        embed_prefix=not vit.no_embed_class,
        pool=_pool(vit),
        pool_prefix=vit.pool_include_prefix,
        eps=_eps(model, layers, contexts, react=False),
        react_eps=_eps(model, layers, contexts, react=True),
        react=tuple(layers),
        context=tuple(contexts),
        operands=_operands(model),
    )
    return Network.from_dict(network.to_dict())


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a model, without what lies within quantizers and `react` parts."""
    inner: list[str] = []
    for name, module in model.named_modules():
        if name and any(name.startswith(f"{outer}.") for outer in inner):
            continue
        if isinstance(module, Quantizer) or _role(module) in ("react", "context"):
            inner.append(name)
        yield name, module


def _role(module: nn.Module) -> str | None:
    """Which part of a `react` block a module is, by its own word."""
    return getattr(module, "packed_role", None)


def _check(name: str, module: nn.Module) -> None:
    """Refuse a module that the runtime does not know, or has not at this place."""
    place = re.sub(r"\.\d+", ".#", name)
    kind = module.qat_kind if isinstance(module, Intercepted) else type(module)
    known = kind in KNOWN.get(place, ()) or kind in IDLE or isinstance(module, Quantizer)
    role = _role(module)
    if role is not None:
        known = place in ROLES.get(role, (place,))
    elif re.fullmatch(r"(.*\.)?(qk|av)", name) or type(module) is nn.ModuleList:
        known = True
    if isinstance(module, nn.GELU) and module.approximate != "none":
        known = False
    if not known or getattr(module, "input_transform", None) is not None:
        what = "transforms its input" if known else f"is a {kind.__name__}"
        raise ValueError(f"'{name}' {what}, which the packed runtime cannot run; {INSTEAD}")
    if getattr(module, "gate", None) is not None:
        raise ValueError(f"'{name}' has a gate, which the packed runtime cannot run; {INSTEAD}")


def _check_react(model: nn.Module, blocks: list[str]) -> None:
    """The MLP drops its GELU exactly where its first layer bends itself."""
    for block in blocks:
        mlp: Any = model.get_submodule(f"{block}.mlp")
        if _role(mlp.fc1) == "react" and _role(mlp) != "mlp":
            raise ValueError(
                f"'{block}.mlp' bends twice, which the packed runtime cannot run; {INSTEAD}"
            )


def _prefix(vit: Any) -> tuple[str, ...]:
    tokens = ["cls_token", "dist_token" if hasattr(vit, "dist_token") else "reg_token"]
    return tuple(name for name in tokens if getattr(vit, name, None) is not None)


def _pool(vit: Any) -> str:
    if hasattr(vit, "dist_token"):
        return "tokens"
    if vit.attn_pool is not None or vit.global_pool not in ("token", "avg"):
        raise ValueError(
            f"the model pools by '{vit.global_pool}', which the packed runtime cannot run; "
            f"{INSTEAD}"
        )
    return vit.global_pool


def _eps(model: nn.Module, layers: list[str], contexts: list[str], *, react: bool) -> float:
    """What the LayerNorms, or those of `react` parts, add to the variance; the same for all."""
    owned = {*(f"{layer}.norm" for layer in layers), *(f"{one}.context.norm" for one in contexts)}
    found = {
        module.eps
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and (name in owned) == react
    }
    if len(found) > 1:
        raise ValueError(
            f"LayerNorms differ in eps ({sorted(found)}), which is not packed; {INSTEAD}"
        )
    return found.pop() if found else 0.0


def _operands(model: nn.Module) -> dict[str, dict[str, str]]:
    """For each module with quantized operands, the form of each."""
    places = {path: operand for operand, path in OPERANDS.items()}
    found: dict[str, dict[str, str]] = {}
    for name, quantizer in model.named_modules():
        if not isinstance(quantizer, Quantizer):
            continue
        path = next(path for path in places if name.endswith(f".{path}") or name == path)
        if quantizer.packed_form is None:
            raise ValueError(
                f"'{name}' is a {type(quantizer).__name__}, which a packed file cannot hold; "
                f"{INSTEAD}"
            )
        module = name.removesuffix(f".{path}")
        found.setdefault(module, {})[places[path]] = quantizer.packed_form
    return found

"""A model as a chain of stages: embedding, blocks, classifier.

Block reconstruction needs to run any stage alone and to run what follows it. Each stage maps one
tensor to the next; their composition is the model.
"""

from collections.abc import Callable
from typing import Any

from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from qat.reconstruct.sequences import sequence_stages
from qat.reconstruct.stage import Stage


def vit_stages(model: VisionTransformer) -> list[Stage]:
    """Embedding with positions, each block, then norm and head."""

    def embed(images: Tensor) -> Tensor:
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))

    def classify(tokens: Tensor) -> Tensor:
        return model.forward_head(model.norm(tokens))

    blocks = [Stage(f"blocks.{i}", (block,), block) for i, block in enumerate(model.blocks)]
    last: list[nn.Module] = [model.norm, model.fc_norm, model.head]
    if model.attn_pool is not None:
        last.append(model.attn_pool)
    first = Stage("patch_embed", (model.patch_embed, model.norm_pre), embed)
    return [first, *blocks, Stage("head", tuple(last), classify)]


def swin_stages(model: SwinTransformer) -> list[Stage]:
    """Embedding, each patch merging and block in turn, then norm and head."""

    def classify(tokens: Tensor) -> Tensor:
        return model.forward_head(model.norm(tokens))

    stages = [Stage("patch_embed", (model.patch_embed,), model.patch_embed)]
    layers: Any = model.layers
    for i, layer in enumerate(layers):
        if not isinstance(layer.downsample, nn.Identity):
            merge = layer.downsample
            stages.append(Stage(f"layers.{i}.downsample", (merge,), merge))
        for j, block in enumerate(layer.blocks):
            stages.append(Stage(f"layers.{i}.blocks.{j}", (block,), block))
    return [*stages, Stage("head", (model.norm, model.head), classify)]


def resnet_stages(model: ResNet) -> list[Stage]:
    """Stem, each residual block with its BatchNorms, then pooling and classifier."""

    def stem(images: Tensor) -> Tensor:
        return model.maxpool(model.act1(model.bn1(model.conv1(images))))

    first = Stage("conv1", (model.conv1, model.bn1, model.act1, model.maxpool), stem, 1)
    blocks = [
        Stage(f"layer{i}.{j}", (block,), block, 1)
        for i in range(1, 5)
        for j, block in enumerate(model.get_submodule(f"layer{i}").children())
    ]
    return [first, *blocks, Stage("fc", (model.global_pool, model.fc), model.forward_head)]


CHAINS: dict[type[nn.Module], Callable[..., list[Stage]]] = {
    VisionTransformer: vit_stages,
    SwinTransformer: swin_stages,
    ResNet: resnet_stages,
}


def stages(model: nn.Module) -> list[Stage]:
    """The stages of a model, in order.

    Raises:
        ValueError: If the model is of an architecture whose chain is neither known nor found.
    """
    chain = CHAINS.get(type(model))
    if chain is None:
        found = sequence_stages(model)
        if found is not None:
            return found
        raise ValueError(
            "cannot divide the model into stages: no sequence of like blocks in "
            f"{type(model).__name__} runs one after another on a single tensor, with nothing of "
            "an image passed around it. Use a calibration-only method (minmax, percentile_mse), "
            "or add its chain to qat.reconstruct.stages"
        )
    return chain(model)

"""Small models, with the uneven channels that make post-training quantization hard."""

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from qat import Plan
from qat.models import timm_model


def images(count: int, seed: int = 0) -> Tensor:
    """Smooth random images of 16 pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, 16, mode="bilinear")


def uneven(model: nn.Module, seed: int) -> nn.Module:
    """Give a model random weights, and LayerNorms some channels of which are huge."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                gain = torch.rand(module.weight.shape, generator=generator) * 2 + 0.2
                gain[:2] *= 10
                module.weight.copy_(gain)
    return model.eval()


def tiny_vit(seed: int = 0) -> VisionTransformer:
    """Two blocks of width 24."""
    arguments = {"depth": 2, "embed_dim": 24, "num_heads": 3, "patch_size": 4}
    model = timm_model("vit_tiny_patch16_224", num_classes=7, img_size=16, model_args=arguments)
    return uneven(model, seed)  # type: ignore[return-value]


def tiny_swin(seed: int = 0) -> SwinTransformer:
    """Two stages with a patch merging between them; windows without padding."""
    arguments = {
        "depths": (2, 1),
        "embed_dim": 24,
        "num_heads": (2, 4),
        "patch_size": 2,
        "window_size": 4,
    }
    model = timm_model(
        "swin_tiny_patch4_window7_224", num_classes=7, img_size=16, model_args=arguments
    )
    return uneven(model, seed)  # type: ignore[return-value]


def plan(bits: int) -> Plan:
    """Every product on `bits` bits, the image on eight."""
    unsigned = {"bits": bits, "signed": False}
    weight = {**unsigned, "granularity": "per_channel"}
    operands = ("input", "query", "key", "attention", "value")
    return Plan.from_list(
        [
            {
                "pattern": "patch_embed.proj",
                "weight": weight,
                "input": {"bits": 8, "signed": False},
            },
            {"pattern": "*", "weight": weight, **dict.fromkeys(operands, unsigned)},
        ]
    )

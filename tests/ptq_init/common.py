"""Small models, with the uneven channels that make post-training quantization hard; a journal."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from qat import Plan
from qat.journal import Journal
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


class Memory(Journal):
    """Remembers; stops after some parts, if asked to."""

    def __init__(self, stop_after: int = 1000) -> None:
        self.parts: dict[str, Mapping[str, Any]] = {}
        self.losses: list[tuple[str, int, dict[str, float]]] = []
        self.notes: dict[str, Any] = {}
        self.stop_after = stop_after

    def note(self, key: str, value: Any) -> None:
        self.notes[key] = value

    def begin(self, part: str, num_steps: int, parts_left: int) -> None:
        pass

    def step(self, part: str, step: int, losses: Mapping[str, float]) -> None:
        self.losses.append((part, step, dict(losses)))

    def finish(self, part: str, state: Mapping[str, Any]) -> None:
        self.parts[part] = state
        if len(self.parts) == self.stop_after:
            raise KeyboardInterrupt

    def finished(self, part: str) -> Mapping[str, Any] | None:
        return self.parts.get(part)

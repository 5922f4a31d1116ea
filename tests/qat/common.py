"""Plans, small models and comparisons shared by the tests of the core."""

from functools import partial
from typing import Any

import torch
from torch import nn

import qat
from binaryvit import BinaryQuantizers
from binaryvit.asm import DynamicShift, ScaledShift, StandardizedShift, StaticShift
from binaryvit.convert import react_
from qat import Plan
from qat.quantizers import LSQ, MSE, Affine

SHIFTS = (StaticShift, DynamicShift, ScaledShift, StandardizedShift)

FACTORIES = {
    "lsq": LSQ,
    "affine": Affine,
    "affine-mse": partial(Affine, observer=partial(MSE, num_candidates=3)),
    **{f"binary-{shift.__name__}": BinaryQuantizers(shift=shift) for shift in SHIFTS},
}


def plan(bits: int = 4, blocks: str = "blocks") -> Plan:
    """All layers and both products of every block at one width."""
    signed, unsigned = {"bits": bits}, {"bits": bits, "signed": False}
    attention = {"query": signed, "key": signed, "value": signed, "attention": unsigned}
    layers = {"weight": {"bits": bits, "granularity": "per_channel"}, "input": signed}
    return Plan.from_list(
        [{"pattern": f"{blocks}.*.attn", **attention}, {"pattern": f"{blocks}.*", **layers}]
    )


def converted(model: nn.Module, factory: str) -> nn.Module:
    """`model` converted in place, with one bit where the factory is binary."""
    bits = 1 if factory.startswith("binary") else 4
    qat.convert_(model, plan(bits), FACTORIES[factory])
    return model


def quantized(model: nn.Module, images: torch.Tensor, kind: str) -> nn.Module:
    """`model` converted in place (`lsq` or `react`) and calibrated on `images`."""
    if kind == "react":
        react_(model, plan(1), BinaryQuantizers())
    else:
        qat.convert_(model, plan(4), FACTORIES[kind])
    qat.calibrate(model, [images])
    return model


def swin() -> nn.Module:
    """A Swin of two stages; the second block of each is shifted, and the first stage's masked."""
    return qat.timm_model(
        "swin_tiny_patch4_window7_224",
        img_size=16,
        in_chans=1,
        num_classes=5,
        model_args={
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (2, 4),
        },
    ).eval()


def distilled_deit() -> nn.Module:
    """A DeiT of one block with a class and a distillation head."""
    return qat.timm_model(
        "deit_tiny_distilled_patch16_224",
        img_size=8,
        in_chans=1,
        num_classes=5,
        model_args={"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2},
    ).eval()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """A copy of every tensor and phase of a model."""
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in model.state_dict().items()
    }


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Names, bits of tensors, and phases agree."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name

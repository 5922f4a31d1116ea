"""Converted and calibrated models whose every part has a value of its own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import qat
from binaryvit.convert import react_
from qat import Plan, runtime
from qat.export.pack import export_packed
from qat.quantizers import QuantizerFactory
from tests.conftest import make_tiny_vit

LEARNED = ("shift", "before", "after", "slope", "gain")


def student(
    plan: Plan,
    factory: QuantizerFactory,
    images: Tensor,
    convert: Callable[..., object] = qat.convert_,
    model: nn.Module | None = None,
) -> nn.Module:
    """A tiny ViT, or another model, converted and calibrated, its learned shifts at random."""
    model = model or make_tiny_vit()
    convert(model, plan, factory)
    qat.calibrate(model, [images])
    for name, parameter in model.named_parameters():
        if name.endswith(LEARNED):
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def logits(model: nn.Module, images: Tensor) -> np.ndarray:
    """Logits of the simulated model."""
    with torch.no_grad():
        return model(images).numpy()


def packed(model: nn.Module, folder: Path, *, half: bool = False) -> runtime.Model:
    """The model, written and read."""
    export_packed(model, folder / "model.lowbit", half=half)
    return runtime.load(folder / "model.lowbit")


__all__ = ["logits", "packed", "react_", "student"]

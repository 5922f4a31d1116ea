"""What a packed model saves: bytes on disk, and time for one image."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from qat.models import example_inputs
from qat.runtime import Model

ROUNDS = 7


def float_bytes(model: nn.Module) -> int:
    """Bytes of a float model as a safetensors file in 32 bits."""
    return len(save({name: value.float() for name, value in model.state_dict().items()}))


@torch.no_grad()
def seconds_of_image(float_model: nn.Module, packed: Model) -> dict[str, float]:
    """Seconds for one image in this process, by the float model in torch and by the packed one.

    Both run in turns, so that a busy machine slows both; the median counts.
    """
    (image,) = example_inputs(float_model)
    pixels = image.numpy()
    float_model.eval()
    runs = [lambda: float_model(image), lambda: packed(pixels)]
    rounds = [[_seconds(run) for run in runs] for _ in range(ROUNDS)]
    found = [median(column) for column in zip(*rounds, strict=True)]
    return dict(zip(("seconds_per_image_float", "seconds_per_image"), found, strict=True))


def _seconds(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun

"""What an exported model saves: bytes on disk, and time for one image."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from qat.models import example_inputs

ROUNDS = 11


def float_bytes(model: nn.Module) -> int:
    """Bytes of a float model as a safetensors file in 32 bits."""
    return len(save({name: value.float() for name, value in model.state_dict().items()}))


@torch.no_grad()
def seconds_of_image(
    float_model: nn.Module, exported: Callable[..., np.ndarray]
) -> dict[str, float]:
    """Seconds for one image in this process, by the float model in torch and by the exported one.

    Both run in turns, so that a busy machine slows both; the first round warms up, the median of
    the others counts.
    """
    inputs = example_inputs(float_model)
    arrays = [each.numpy() for each in inputs]
    float_model.eval()
    runs = [lambda: float_model(*inputs), lambda: exported(*arrays)]
    rounds = [[_seconds(run) for run in runs] for _ in range(ROUNDS)]
    found = [median(column[1:]) for column in zip(*rounds, strict=True)]
    return dict(zip(("seconds_per_image_float", "seconds_per_image"), found, strict=True))


def _seconds(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun

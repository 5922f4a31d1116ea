"""A DiT of two blocks of width 24 that computes something, and inputs for it."""

from functools import partial

import torch
from torch import Tensor

import qat
from qat import Plan
from qat.diffusion import DiT, dit
from qat.quantizers import DynamicToken, PerOperand, QuantizerFactory, TwinLog

ARGUMENTS = {
    "img_size": 8,
    "patch_size": 4,
    "dim": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}
TWIN = PerOperand(weight=partial(TwinLog, mode="clean"), input=DynamicToken)


def tiny_dit(**arguments: object) -> DiT:
    """A DiT with random weights everywhere, where a fresh one predicts zero."""
    model = dit(**{**ARGUMENTS, **arguments})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, time steps and classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    times = torch.randint(1000, (count,), generator=generator)
    return x, times, torch.randint(5, (count,), generator=generator)


def plan(weight: int = 4, activation: int = 4) -> Plan:
    """The linear layers of the blocks."""
    return Plan.from_list(
        [
            {"pattern": "blocks.*.modulation.linear", "reason": "once an image"},
            {
                "pattern": "blocks.*",
                "weight": {"bits": weight, "signed": False, "granularity": "per_channel"},
                "input": {"bits": activation},
            },
        ]
    )


def converted(model: DiT, bits: int = 4, factory: QuantizerFactory = TWIN) -> DiT:
    """The model converted in place."""
    qat.convert_(model, plan(bits, bits), factory)
    return model

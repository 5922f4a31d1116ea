"""Methods, a model that knows digits, and streams for the tests of adaptation."""

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import qat
from qat.quantizers import Affine
from qat.tta import (
    ABL1,
    ABL2,
    ABL3,
    ABL4,
    EATA,
    FOA,
    LAME,
    SAR,
    SGD,
    ABL1e,
    Adapter,
    CoTTA,
    Method,
    RDumb,
    RoTTA,
    Source,
    Tent,
)  # fmt: skip
from tests.conftest import make_tiny_vit
from tests.qat.common import plan

FAST = SGD(lr=1e-2)
METHODS: dict[str, Method] = {
    "source": Source(),
    "tent": Tent(optimizer=FAST),
    "eata": EATA(optimizer=FAST, margin=0.9, similarity=0.95),
    "sar": SAR(optimizer=FAST, margin=0.9, floor=0.0),
    "cotta": CoTTA(optimizer=FAST, views=2),
    "rotta": RoTTA(capacity=8),
    "lame": LAME(neighbours=2),
    "rdumb": RDumb(EATA(optimizer=FAST, margin=0.9, similarity=0.95, anchor=0.0), period=3),
    "foa": FOA(population=4),
}
GRADIENT = ("tent", "eata", "sar", "cotta")
BALANCES = {
    "1": ABL1(),
    "1e+": ABL1e(),
    "1e-": ABL1e(sign=-1),
    "2": ABL2(),
    "3": ABL3(),
    "4": ABL4(),
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    """All digits in file order, normalized, and their classes."""
    bunch = load_digits()
    images = torch.tensor(bunch.images[:, None] / 8 - 1, dtype=torch.float32)
    return images, torch.tensor(bunch.target)


@cache
def _weights(bits: int | None) -> dict[str, Tensor]:
    """Random features, and a classifier by ridge regression on noisy digits; no training."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_tiny_vit()
    found: list[Tensor] = []
    images, labels = digits()
    copies = [images + s * torch.randn(images.shape, generator=generator) for s in (0.0, 0.2, 0.4)]
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 2 or "patch_embed.proj.weight" in name:
                value.normal_(0, 0.5 if "patch" in name else 0.1, generator=generator)
        handle = model.head.register_forward_pre_hook(lambda _, x: found.append(x[0]))  # type: ignore[union-attr]
        model(torch.cat(copies).clamp(-1, 1))
        handle.remove()
        x = torch.cat((found[0], torch.ones(len(found[0]), 1)), 1)
        target = 12 * nn.functional.one_hot(labels, 10).float().repeat(len(copies), 1)
        solved = torch.linalg.solve(x.T @ x + 3 * torch.eye(x.shape[1]), x.T @ target)
        model.head.weight.copy_(solved[:-1].T)  # type: ignore[union-attr]
        model.head.bias.copy_(solved[-1])  # type: ignore[union-attr]
    if bits is not None:
        qat.convert_(model, plan(bits), Affine)
        qat.calibrate(model, [images[:32]])
    return model.state_dict()


def knowing(bits: int | None = None) -> nn.Module:
    """A model that knows digits, in float or on so many bits."""
    model = make_tiny_vit()
    if bits is not None:
        qat.convert_(model, plan(bits), Affine)
    model.load_state_dict(_weights(bits))
    return model.eval()


@cache
def shared(bits: int | None = None) -> nn.Module:
    """The one model that most tests adapt on; adapters do not change it."""
    return knowing(bits)


def noisy(seed: int = 0, strength: float = 0.2, size: int = 8, sort: bool = False) -> list[Tensor]:
    """Batches of noisy digits."""
    images, labels = digits()
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(images))
    if sort:
        order = order[np.argsort(labels[order].numpy(), kind="stable")]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return list((images + strength * noise)[order].clamp(-1, 1).split(size))


def labels_of(seed: int = 0, size: int = 8, sort: bool = False) -> list[Tensor]:
    """Classes of the batches of `noisy`."""
    labels = digits()[1]
    order = np.random.default_rng(seed).permutation(len(labels))
    if sort:
        order = order[np.argsort(labels[order].numpy(), kind="stable")]
    return list(labels[order].split(size))


def clean() -> list[Tensor]:
    """Calibration batches."""
    return list(digits()[0][:32].split(16))


def adapter(name: str, bits: int | None = None, model: nn.Module | None = None, **more) -> Adapter:
    """An adapter of a method over the model that knows digits."""
    return Adapter(shared(bits) if model is None else model, METHODS[name], clean(), **more)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Equal names and bits."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)

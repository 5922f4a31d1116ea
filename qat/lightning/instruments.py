"""Instruments of callbacks: they look into a module in the middle of training, without a trace."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn


def model_of(module: LightningModule) -> nn.Module:
    """The model that a module trains."""
    model = module.model
    assert isinstance(model, nn.Module)
    return model


def average_of(trainer: Trainer) -> nn.Module | None:
    """The average of weights that a callback of Lightning keeps, once it has begun."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            average: Any = callback._average_model
            count = getattr(average, "n_averaged", getattr(callback, "n_averaged", None))
            return getattr(average, "module", average) if count else None
    return None


@contextmanager
def weights_of(other: nn.Module, module: nn.Module) -> Iterator[None]:
    """Within the block, a module has the parameters of its average."""
    pairs = list(zip(module.parameters(), other.parameters(), strict=True))
    kept = [own.detach().clone() for own, _ in pairs]
    try:
        for own, theirs in pairs:
            own.data.copy_(theirs)
        yield
    finally:
        for (own, _), value in zip(pairs, kept, strict=True):
            own.data.copy_(value)


def first_not_finite(module: LightningModule, batch: Any) -> tuple[str, bool]:
    """The first layer whose output is not finite, and whether its inputs and weights still are."""
    found: list[tuple[str, bool]] = []

    def look(name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        if not found and not _finite(output):
            found.append((name, _finite([*inputs, *layer.parameters(recurse=False)])))

    with ExitStack() as stack:
        for name, layer in model_of(module).named_modules():
            handle = layer.register_forward_hook(partial(look, name))
            stack.callback(handle.remove)
        loss_of(module, batch)
    return found[0] if found else ("", True)


def _finite(value: Any) -> bool:
    parts: Sequence[Any] = value if isinstance(value, tuple | list) else (value,)
    return all(bool(part.isfinite().all()) for part in parts if isinstance(part, Tensor))


@torch.no_grad()
def loss_of(module: LightningModule, batch: Any) -> float:
    """Loss of a batch by the module's own training step, of which no log and no draw is left."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.callback(setattr, part, "training", part.training)
        module.eval()
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(module.trainer.precision_plugin.train_step_context())
        if getattr(module, "compiles", False):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name in ("log", "log_dict"):
            setattr(module, name, lambda *_, **__: None)
            stack.callback(delattr, module, name)
        loss: Any = module.training_step(batch, 0)
    return float(loss["loss"] if isinstance(loss, dict) else loss)

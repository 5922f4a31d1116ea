"""Calibration: collect statistics on a few batches, then freeze them into quantizer parameters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from qat.quantizers import Phase, Quantizer, quantizers, set_phase


class Initialiser(Protocol):
    """Sets quantizer state, or reparametrizes weights, and leaves phase QUANTIZE.

    Any initialiser may start quantization-aware training or binarization.
    """

    def __call__(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Initialise a converted model on batches of preprocessed images."""
        ...


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Observe within the block; on leaving it, freeze every quantizer and start to quantize.

    If the block raises, or a quantizer cannot be frozen, phases and parameters are as before.

    Raises:
        ValueError: If the model has no quantizers.
        RuntimeError: If a quantizer saw no data.
    """
    found = dict(quantizers(model))
    if not found:
        raise ValueError("the model has no quantizers; convert it first, see `qat.convert_`")
    phases = {name: quantizer.phase for name, quantizer in found.items()}
    state = {name: _copy(quantizer) for name, quantizer in found.items()}
    set_phase(model, Phase.OBSERVE)
    try:
        yield
        for name, quantizer in found.items():
            _freeze(name, quantizer)
    except BaseException:
        for name, quantizer in found.items():
            quantizer.load_state_dict(state[name])
            quantizer.phase = phases[name]
        raise
    else:
        set_phase(model, Phase.QUANTIZE)
    finally:
        for quantizer in found.values():
            quantizer.forget()


def calibrate(model: nn.Module, batches: Iterable[Float[Tensor, "batch c h w"]]) -> None:
    """Calibrate every quantizer by its own observer. The plain `Initialiser`.

    In a distributed run the quantizers of rank 0 are sent to all others, so that every rank trains
    with the same scales.

    Args:
        model: A converted model.
        batches: Preprocessed images.

    Raises:
        ValueError: If the model has no quantizers, there is no batch, or a batch is not finite.
        RuntimeError: If a quantizer saw no data.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with observing(model), torch.no_grad():
            num_batches = 0
            for images in batches:
                if not torch.isfinite(images).all():
                    raise ValueError(
                        f"calibration batch {num_batches} holds NaN or infinite pixels; "
                        "remove the broken image and calibrate again, the model is unchanged"
                    )
                model(images)
                num_batches += 1
            if not num_batches:
                raise ValueError("calibration needs at least one batch of images, got none")
    finally:
        for module, mode in modes.items():
            module.training = mode
    _broadcast(model)


def _freeze(name: str, quantizer: Quantizer) -> None:
    try:
        quantizer.freeze()
    except RuntimeError as error:
        raise RuntimeError(f"{name}: {error}") from None


def _copy(module: nn.Module) -> dict[str, object]:
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in module.state_dict().items()
    }


def _broadcast(model: nn.Module) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        return
    for _, quantizer in quantizers(model):
        for tensor in (*quantizer.parameters(), *quantizer.buffers()):
            dist.broadcast(tensor.data, src=0)

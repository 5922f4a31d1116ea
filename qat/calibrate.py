"""Calibration: collect statistics on a few batches, then freeze them into quantizer parameters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qat.journal import Journal
from qat.layers import QuantLayer, quantized_weights
from qat.quantizers import ObserverFactory, Phase, Quantizer, quantizers, set_phase

Batch = Tensor | tuple[Tensor, ...]
"""What a model is called with: images, or several inputs, such as noisy images, times, classes."""
AnyBatch = TypeVar("AnyBatch", bound=Batch)


@runtime_checkable
class Initialiser(Protocol):
    """Sets quantizer state, or reparametrizes weights, and leaves phase QUANTIZE.

    Any initialiser may start quantization-aware training or binarization.
    """

    def __call__(
        self, model: nn.Module, batches: Iterable[Any], journal: Journal | None = None
    ) -> None:
        """Initialise a converted model on batches of preprocessed images, or of other inputs.

        The journal hears of the progress of initialisers that take minutes.
        """
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
        _freeze_all(found)
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


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    journal: Journal | None = None,
) -> None:
    """Calibrate every quantizer by its own observer. The plain `Initialiser`.

    In a distributed run the quantizers of rank 0 are sent to all others, so that every rank trains
    with the same scales.

    Args:
        model: A converted model.
        batches: Preprocessed images, or tuples of a model's inputs.
        journal: Not used: this takes seconds.

    Raises:
        ValueError: If the model has no quantizers, there is no batch, or a batch is not finite.
        RuntimeError: If a quantizer saw no data.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with observing(model), torch.no_grad():
            for batch in finite(batches):
                run(model, batch)
    finally:
        for module, mode in modes.items():
            module.training = mode
    _broadcast(model)


def run(model: nn.Module, batch: Batch) -> Any:
    """What the model makes of a batch; libraries wrap tensors in types of their own."""
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def finite(batches: Iterable[AnyBatch]) -> Iterator[AnyBatch]:
    """The batches, each checked.

    Raises:
        ValueError: If there is none, or one holds pixels that are NaN or infinite.
    """
    num_batches = 0
    for batch in batches:
        if not all(torch.isfinite(part).all() for part in _parts(batch)):
            raise ValueError(
                f"calibration batch {num_batches} holds NaN or infinite pixels; "
                "remove the broken image and calibrate again, the model is unchanged"
            )
        yield batch
        num_batches += 1
    if not num_batches:
        raise ValueError("calibration needs at least one batch of images, got none")


def joined(batches: Iterable[AnyBatch]) -> AnyBatch:
    """All batches as one, each checked."""
    found = list(finite(batches))
    if isinstance(found[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]
    return torch.cat(found)  # type: ignore[arg-type, return-value]


def _parts(batch: Batch) -> tuple[Tensor, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


def calibrate_in_order(model: nn.Module, batch: Batch) -> None:
    """Calibrate the quantizers still in FLOAT one after another, in a single forward pass.

    Each is frozen as soon as it has seen its operand, so that those after it observe what an
    already quantized model computes. Ends in phase QUANTIZE.

    Args:
        model: A converted model.
        batch: One batch of preprocessed images, or of other inputs.

    Raises:
        RuntimeError: If a quantizer saw no data.
    """
    _calibrate_weights(model)
    waiting = {q: name for name, q in quantizers(model) if q.phase is Phase.FLOAT}
    if not waiting:
        return
    for quantizer in waiting:
        quantizer.phase = Phase.OBSERVE
    handles = [q.register_forward_pre_hook(partial(_freeze_on_sight, waiting)) for q in waiting]
    try:
        with torch.no_grad():
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if waiting:
        name = next(iter(waiting.values()))
        raise RuntimeError(f"{name}: its operand does not occur in a forward pass of the model")


def _calibrate_weights(model: nn.Module) -> None:
    """Calibrate the weight quantizers still in FLOAT, which need no forward pass."""
    for name, weight, quantizer in quantized_weights(model):
        made = isinstance(model.get_submodule(name), QuantLayer)  # its weight is made on the way
        if quantizer.phase is Phase.FLOAT and not made:
            quantizer.phase = Phase.OBSERVE
            quantizer(weight)
            _freeze(f"{name}.weight_quantizer", quantizer)
            quantizer.forget()
            quantizer.phase = Phase.QUANTIZE


def _freeze_on_sight(
    waiting: dict[Quantizer, str], quantizer: Quantizer, inputs: tuple[Tensor]
) -> None:
    name = waiting.pop(quantizer, None)
    if name is None:
        return
    quantizer(*inputs)  # in phase OBSERVE; comes by here again, no longer waiting
    _freeze(name, quantizer)
    quantizer.forget()
    quantizer.phase = Phase.QUANTIZE


@contextmanager
def observed_by(model: nn.Module, make_observer: ObserverFactory) -> Iterator[None]:
    """Let every quantizer that has an observer use another one within the block."""
    own = {}
    for _, quantizer in quantizers(model):
        observer = getattr(quantizer, "observer", None)
        if isinstance(observer, nn.Module):
            own[quantizer] = observer
            like = next(b for b in observer.buffers() if b.is_floating_point())
            quantizer.observer = make_observer(quantizer.spec, quantizer.shape).to(like)
    try:
        yield
    finally:
        for quantizer, observer in own.items():
            quantizer.observer = observer


@contextmanager
def untouched_on_error(model: nn.Module) -> Iterator[None]:
    """In eval mode within the block; if it raises, weights, quantizers and phases are as before."""
    modes = {module: module.training for module in model.modules()}
    parts = [(m, dict(m._parameters), dict(m._modules)) for m in model.modules()]
    state = _copy(model)
    model.eval()
    try:
        yield
    except BaseException:
        for module, parameters, children in parts:
            module._parameters, module._modules = parameters, children
        model.load_state_dict(state)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode


def _freeze_all(found: dict[str, Quantizer]) -> None:
    """Freeze quantizers; where some saw data and one did not, say that the model passes it by."""
    errors: dict[str, RuntimeError] = {}
    for name, quantizer in found.items():
        try:
            quantizer.freeze()
        except RuntimeError as error:
            errors[name] = error
    if not errors:
        return
    name, error = next(iter(errors.items()))
    if len(errors) == len(found):
        raise RuntimeError(f"{name}: {error}") from None
    raise RuntimeError(
        f"{name}: no batch came by it, while others were observed: the forward pass does without "
        f"it, as without {len(errors) - 1} others; keep it in float by an earlier rule without "
        "specs"
    )


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

"""Probes: what stands in every operand's place while its sensitivity is measured.

A component's sensitivity is asked for at widths the model does not have. A probe takes the place of
a quantizer, passes its operand unchanged, and holds a calibrated quantizer of every width asked
for: what the recipe's factory builds, on the range that the float operand gives.

One-bit codes of activations carry no scale: what follows them in a binary network, a normalization
or a trained factor, restores it. They are compared with their operand at the best common factor.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat.card import conversion_of
from qat.quantizers import ObserverFactory, Phase, Quantizer, QuantizerFactory, quantizers
from qat.quantizers.slots import Slot, slot_of
from qat.spec import Operand


class Probe(nn.Module):
    """Stands in for a quantizer; lets its operand through, or quantizes it at one width.

    Args:
        quantizers: A quantizer for each width.
    """

    phase = Phase.QUANTIZE  # so that attention keeps its products visible

    def __init__(self, quantizers: Mapping[int, Quantizer]) -> None:
        super().__init__()
        self.quantizers = dict(quantizers)  # no submodules: no part of the model meanwhile
        self.bits: int | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths it holds."""
        return tuple(self.quantizers)

    def forward(self, x: Tensor) -> Tensor:
        """The operand, quantized where a width is chosen."""
        return x if self.bits is None else self.at(self.bits, x)

    def at(self, bits: int, x: Tensor) -> Tensor:
        """The operand on the grid of one width."""
        quantizer = self.quantizers[bits]
        out = quantizer(x)
        if bits > 1 or quantizer.operand is Operand.WEIGHT:
            return out
        return out * ((out * x).sum() / out.square().sum().clamp(min=1e-12))

    @torch.no_grad()
    def errors(self, x: Float[Tensor, "*shape"]) -> Iterator[Float[Tensor, "*shape"]]:
        """What quantization adds to an operand, width by width."""
        x = x.detach()
        for bits in self.quantizers:
            yield self.at(bits, x) - x

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the grid of every width from one sight of the operand."""
        for quantizer in self.quantizers.values():
            quantizer.phase = Phase.OBSERVE
            quantizer(x.detach())
            quantizer.freeze()
            quantizer.forget()
            quantizer.phase = Phase.QUANTIZE


Widths = Mapping[Slot, tuple[int, ...]]
"""The widths at which each slot is measured; slots that are not named stay in float."""


@contextmanager
def probing(
    model: nn.Module,
    images: Float[Tensor, "batch c h w"],
    widths: Widths,
    observer: ObserverFactory | None = None,
) -> Iterator[dict[Slot, Probe]]:
    """Put calibrated probes in place of a converted model's quantizers within the block.

    The model computes in float meanwhile, in evaluation mode; afterwards it is as before.

    Args:
        model: A converted model, whose weights may have been reparametrized by an initialiser.
        images: Calibrate the grids.
        widths: The widths of each slot.
        observer: Chooses the ranges of quantizers that have an observer; None leaves them theirs.

    Raises:
        ValueError: If the factory of the model's conversion offers no quantizer for a width.
    """
    conversion = conversion_of(model)
    own = dict(quantizers(model))
    modes = {module: module.training for module in model.modules()}
    probes: dict[Slot, Probe] = {}
    for path, quantizer in own.items():
        slot = slot_of(path, quantizer)
        wanted = widths.get(slot, ())
        probes[slot] = Probe(
            {b: _at(quantizer, b, conversion.make_quantizer, observer) for b in wanted}
        )
    try:
        for path, quantizer in own.items():
            model.set_submodule(path, probes[slot_of(path, quantizer)])
        model.eval()
        _calibrate(model, probes.values(), images)
        yield {slot: probe for slot, probe in probes.items() if probe.widths}
    finally:
        for path, quantizer in own.items():
            model.set_submodule(path, quantizer)
        for module, mode in modes.items():
            module.training = mode


def _at(
    quantizer: Quantizer,
    bits: int,
    make_quantizer: QuantizerFactory,
    make_observer: ObserverFactory | None,
) -> Quantizer:
    """The quantizer that the recipe would build for this operand at another width."""
    spec = replace(quantizer.spec, bits=bits)
    found = make_quantizer(spec, quantizer.shape, quantizer.operand)
    if make_observer is not None and isinstance(getattr(found, "observer", None), nn.Module):
        found.observer = make_observer(spec, quantizer.shape)
    tensor = next(iter((*quantizer.parameters(), *quantizer.buffers())), None)
    return found if tensor is None else found.to(tensor.device)


def _calibrate_on_sight(probe: nn.Module, inputs: tuple[Tensor]) -> None:
    assert isinstance(probe, Probe)
    probe.calibrate(inputs[0])


def _calibrate(model: nn.Module, probes: Iterable[Probe], images: Tensor) -> None:
    """Show every probe its operand once; those of weights see it in the same forward pass."""
    handles = [probe.register_forward_pre_hook(_calibrate_on_sight) for probe in probes]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()

"""M2: how much the output changes when a component is removed.

    Omega(b) = E |f(x) - f_{-i}(x)|^2 * |Q_b(v) - v|^2 / |v|^2

f are logits. Removing a linear layer or an attention product sets its result to zero, so that the
residual, and biases behind it, remain. Both operands of a component share the first factor.

Provenance: *reconstruction*; later papers describe PMQ's metric as the error caused by removal
(from memory), so this is the literal reading, M1 the cheap one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qat.quantizers.slots import Slot, product_of
from qat.search.probe import Probe
from qat.search.sensitivity import Metric, parts


def _nothing(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return torch.zeros_like(out)


@dataclass(frozen=True)
class Removal(Metric):
    """Squared change of the logits on removal, times the share that quantization removes.

    Attributes:
        images_at_once: Images of a forward pass; bounds the memory.
    """

    images_at_once: int = 32

    @torch.no_grad()
    def measure(
        self,
        model: nn.Module,
        probes: Mapping[Slot, Probe],
        images: Float[Tensor, "batch c h w"],
        labels: Int[Tensor, " batch"] | None,
    ) -> dict[Slot, dict[int, float]]:
        """Omega by a forward pass without each component, and one to measure shares."""
        shares: dict[Slot, Tensor] = {}

        def weigh(slot: Slot, probe: nn.Module, inputs: tuple[Tensor]) -> None:
            assert isinstance(probe, Probe)
            errors = [error.square().sum() for error in probe.errors(inputs[0])]
            shares[slot] = torch.stack(errors) / inputs[0].square().sum()

        handles = [
            probe.register_forward_pre_hook(partial(weigh, slot)) for slot, probe in probes.items()
        ]
        # Shares come from the first images, like the grids; all images decide on removals.
        model(images[: self.images_at_once])
        for handle in handles:
            handle.remove()
        exact = self._logits(model, images)
        changes: dict[str, float] = {}
        for name in dict.fromkeys(map(product_of, probes)):
            module = model.get_submodule(name)
            handle = module.register_forward_hook(_nothing)
            changes[name] = (self._logits(model, images) - exact).square().sum(1).mean().item()
            handle.remove()
        return {
            slot: {
                bits: changes[product_of(slot)] * share
                for bits, share in zip(probe.widths, shares[slot].tolist(), strict=True)
            }
            for slot, probe in probes.items()
        }

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        return torch.cat([model(batch) for batch, _ in parts(images, None, self.images_at_once)])

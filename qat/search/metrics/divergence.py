"""M6, the ground truth: the divergence of the output with one operand quantized, all else in float.

    Omega(b) = mean over images of KL(f(x) || f(x) with one operand on b bits)

One forward pass for each slot and width, so it is slow; nothing is approximated but the sum.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from qat.quantizers.slots import Slot
from qat.search.probe import Probe
from qat.search.sensitivity import Metric, parts


@dataclass(frozen=True)
class OutputDivergence(Metric):
    """Divergence of the output distribution in nats.

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
        """Omega by trying every slot at every width."""
        exact = self._log_p(model, images)
        table: dict[Slot, dict[int, float]] = {slot: {} for slot in probes}
        for slot, probe in probes.items():
            for bits in probe.widths:
                probe.bits = bits
                found = self._log_p(model, images)
                table[slot][bits] = divergence(exact, found)
            probe.bits = None
        return table

    def _log_p(self, model: nn.Module, images: Tensor) -> Float[Tensor, "batch classes"]:
        logits = [model(batch) for batch, _ in parts(images, None, self.images_at_once)]
        # The divergence at 8 bits is far below what float32 resolves in a sum over classes.
        return F.log_softmax(torch.cat(logits).double(), -1)


def divergence(
    exact: Float[Tensor, "batch classes"], found: Float[Tensor, "batch classes"]
) -> float:
    """Mean `KL(exact || found)` of log-probabilities, in nats."""
    kl = F.kl_div(found, exact, reduction="batchmean", log_target=True)
    return max(0.0, kl.item())

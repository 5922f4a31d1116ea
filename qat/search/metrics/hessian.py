"""M5: the trace of the Hessian, HAWQ-V2's sensitivity, by Hutchinson's estimator.

Dong, Yao, Arfeen, Gholami, Mahoney, Keutzer. NeurIPS 2020. https://arxiv.org/abs/1911.03852

    Omega(b) = tr(H_i) / n_i * |Q_b(v_i) - v_i|^2,    tr(H_i) = E_r[r_i . (H r)_i],  r in {-1, +1}

H is the Hessian of the mean negative log-likelihood; one random vector over all weights and all
activations at once serves every block H_i, at the price of noise from the blocks beside it. For an
activation, n is the number of values of all images, H and the error are those of all images.

Provenance: the authors' published notebook, in the words of a secondary source.
Deviation: a trace that comes out negative counts as zero.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qat.likelihood import check_target, log_likelihoods
from qat.quantizers.slots import Slot
from qat.search.probe import Probe
from qat.search.sensitivity import Metric, parts
from qat.spec import Operand


@dataclass(frozen=True)
class HessianTrace(Metric):
    """Mean curvature of a component times its squared quantization error.

    Attributes:
        num_samples: Random vectors of the estimator.
        target: Whose likelihood is differentiated; HAWQ has labels, `predicted` needs none.
        seed: Draws the random vectors.
        images_at_once: Images of a double backward pass; bounds the memory.
    """

    num_samples: int = 50
    target: str = "predicted"
    seed: int = 0
    images_at_once: int = 8

    def __post_init__(self) -> None:
        check_target(self.target)
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")

    @property
    def needs_labels(self) -> bool:
        """True for the target `labels`."""
        return self.target == "labels"

    def measure(
        self,
        model: nn.Module,
        probes: Mapping[Slot, Probe],
        images: Float[Tensor, "batch c h w"],
        labels: Int[Tensor, " batch"] | None,
    ) -> dict[Slot, dict[int, float]]:
        """Omega from the mean of all estimates of the trace."""
        traces = [0.0] * len(probes)
        errors, sizes = squared_errors(model, probes, images, self.images_at_once)
        for estimate in self.estimates(model, probes, images, labels):
            traces = [total + new for total, new in zip(traces, estimate, strict=True)]
        return {
            slot: {
                bits: max(0.0, trace / self.num_samples) / sizes[slot] * error
                for bits, error in zip(probe.widths, errors[slot].tolist(), strict=True)
            }
            for (slot, probe), trace in zip(probes.items(), traces, strict=True)
        }

    def estimates(
        self,
        model: nn.Module,
        probes: Mapping[Slot, Probe],
        images: Float[Tensor, "batch c h w"],
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Iterator[list[float]]:
        """Independent estimates of the trace of every slot, in the order of the probes."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.num_samples):
            totals = torch.zeros(len(probes), dtype=torch.float64)
            for batch, batch_labels in parts(images, labels, self.images_at_once):
                with torch.enable_grad(), _watched(model, probes) as operands:
                    likelihoods = log_likelihoods(
                        model(batch), self.target, batch_labels, generator
                    )
                    loss = -likelihoods.sum() / len(images)
                    values = [operands[slot] for slot in probes]
                    totals += _hutchinson(loss, values, generator)
            yield totals.tolist()


def _hutchinson(loss: Tensor, values: list[Tensor], generator: torch.Generator) -> Tensor:
    """`r . (H r)` of each block of the Hessian of `loss`, for one random sign vector r."""
    gradients = torch.autograd.grad(loss, values, create_graph=True)
    signs = [
        torch.randint(0, 2, v.shape, generator=generator).to(v).mul_(2).sub_(1) for v in values
    ]
    products = torch.autograd.grad(gradients, values, signs, allow_unused=True)
    found = [
        0.0 if product is None else (sign * product).sum().item()
        for sign, product in zip(signs, products, strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)


@contextmanager
def _watched(model: nn.Module, probes: Mapping[Slot, Probe]) -> Iterator[dict[Slot, Tensor]]:
    """Collect the operand that every probe lets through, as part of the graph."""
    operands: dict[Slot, Tensor] = {}

    def keep(slot: Slot, probe: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        out = out.view_as(out)  # the operand as this product reads it, whoever else does
        operands[slot] = out if out.requires_grad else out.detach().requires_grad_(True)
        return operands[slot]

    handles = [probe.register_forward_hook(partial(keep, slot)) for slot, probe in probes.items()]
    try:
        yield operands
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def squared_errors(
    model: nn.Module, probes: Mapping[Slot, Probe], images: Tensor, size: int
) -> tuple[dict[Slot, Tensor], dict[Slot, int]]:
    """Squared error of every slot at each width, and its number of values, over all images."""
    errors: dict[Slot, Tensor] = {}
    sizes: dict[Slot, int] = {}

    def add(slot: Slot, probe: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(probe, Probe)
        if slot.operand is Operand.WEIGHT and slot in errors:
            return
        found = torch.stack([error.square().sum() for error in probe.errors(inputs[0])]).double()
        errors[slot] = errors.get(slot, 0.0) + found
        sizes[slot] = sizes.get(slot, 0) + inputs[0].numel()

    handles = [
        probe.register_forward_pre_hook(partial(add, slot)) for slot, probe in probes.items()
    ]
    for batch, _ in parts(images, None, size):
        model(batch)
    for handle in handles:
        handle.remove()
    return errors, sizes

"""What a reconstruction trains: weights, their rounding, quantizer steps.

A set is a frozen value that says how; `attach` opens it on the modules of one stage, hands its
parameters to the optimizer, and `close` leaves plain modules behind.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat.layers import quantized_weights
from qat.quantizers import Affine, quantizers
from qat.spec import Operand

Modules = Iterable[nn.Module]


def _no_penalty(progress: float) -> None:
    return None


def _nothing() -> None:
    pass


@final
@dataclass(frozen=True)
class Attachment:
    """A trainable set at work on one stage.

    Attributes:
        groups: Parameter groups of the optimizer.
        penalty: A term of the loss that belongs to the set, at a progress from 0 to 1.
        after_step: Keeps the parameters where they may be.
        close: Leaves the stage as it is to be used.
    """

    groups: list[dict[str, Any]]
    penalty: Callable[[float], Tensor | None] = _no_penalty
    after_step: Callable[[], None] = _nothing
    close: Callable[[], None] = _nothing


@runtime_checkable
class Trainable(Protocol):
    """A choice of what is trained."""

    def attach(self, modules: Modules) -> Attachment:
        """Open the set on the modules of a stage."""
        ...


@dataclass(frozen=True)
class Weights:
    """Every float parameter of the stage, weights straight through their rounding.

    Attributes:
        lr: Learning rate of Adam.
        norms: Train the affine parameters of LayerNorms too.
    """

    lr: float
    norms: bool = True

    def attach(self, modules: Modules) -> Attachment:
        """Collect the parameters that belong to no quantizer."""
        modules = list(modules)
        excluded = {id(p) for m in modules for _, q in quantizers(m) for p in q.parameters()}
        if not self.norms:
            norms = (m for top in modules for m in top.modules() if isinstance(m, nn.LayerNorm))
            excluded |= {id(p) for norm in norms for p in norm.parameters()}
        found = {id(p): p for m in modules for p in m.parameters() if id(p) not in excluded}
        return Attachment([{"params": list(found.values()), "lr": self.lr}] if found else [])


SMALLEST_STEP = 0.1
"""A step never falls below this share of its start."""


@torch.no_grad()
def _keep_above(floors: list[tuple[nn.Parameter, Tensor]]) -> None:
    for scale, floor in floors:
        torch.maximum(scale, floor, out=scale)


@dataclass(frozen=True)
class Steps:
    """Step sizes of activation quantizers, by the gradient of LSQ.

    Attributes:
        lr: Learning rate of Adam, as a share of each step's starting size.
        weights: Train the steps of weight quantizers as well.
    """

    lr: float
    weights: bool = False

    def attach(self, modules: Modules) -> Attachment:
        """Collect the scales."""
        found = [q for m in modules for _, q in quantizers(m)]
        chosen = [q for q in found if self.weights or q.operand is not Operand.WEIGHT]
        steps = (getattr(q, "scale", None) for q in chosen)
        scales = [step for step in steps if isinstance(step, nn.Parameter)]
        floors = [(scale, SMALLEST_STEP * scale.detach().abs()) for scale in scales]
        # Each scale moves in proportion to its size: they differ by orders of magnitude.
        groups = [{"params": [s], "lr": self.lr * s.detach().abs().mean().item()} for s in scales]
        return Attachment(groups, after_step=partial(_keep_above, floors))


def rectified_sigmoid(v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Stretched sigmoid `clip(1.2 sigmoid(v) - 0.1, 0, 1)`, which reaches 0 and 1."""
    return (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)


class SoftRounding(nn.Module):
    """Stands in for a uniform weight quantizer while the direction of rounding is trained.

    AdaRound, Nagel et al., ICML 2020, https://arxiv.org/abs/2004.10568:
    `w^ = s (clip(floor(w / s) + h(V) + z, qmin, qmax) - z)`, V started so that h is the remainder.

    Args:
        weight: The weight, fixed.
        quantizer: Its quantizer.
    """

    def __init__(self, weight: Tensor, quantizer: Affine) -> None:
        super().__init__()
        self.quantizer = quantizer
        steps = weight.detach() / quantizer.scale.detach()
        self.floor = steps.floor()
        remainder = (steps - self.floor).clamp(0.01, 0.99)
        self.v = nn.Parameter(-torch.log(1.2 / (remainder + 0.1) - 1))

    def forward(self, weight: Tensor) -> Tensor:
        """The softly rounded weight; the argument is not read."""
        return self._weight(rectified_sigmoid(self.v))

    def rounded(self) -> Tensor:
        """The weight rounded for good; its quantizer maps it onto itself."""
        return self._weight((self.v.detach() > 0).float())

    def indecision(self, sharpness: float) -> Tensor:
        """`sum(1 - |2 h - 1|^sharpness)`: zero where every rounding is decided."""
        return (1 - (2 * rectified_sigmoid(self.v) - 1).abs().pow(sharpness)).sum()

    def _weight(self, up: Tensor) -> Tensor:
        spec, offset = self.quantizer.spec, self.quantizer.zero_point
        codes = (self.floor + up + offset).clamp(spec.qmin, spec.qmax)
        return (codes - offset) * self.quantizer.scale


@dataclass(frozen=True)
class Rounding:
    """Whether each weight is rounded up or down (AdaRound).

    Attributes:
        lr: Learning rate of Adam.
        strength: Weight of the penalty on roundings that are not decided; it begins after a fifth
            of the steps, and its exponent falls from 20 to 2.
    """

    lr: float = 1e-3
    strength: float = 0.01

    def attach(self, modules: Modules) -> Attachment:
        """Put a `SoftRounding` in place of each weight quantizer.

        Raises:
            ValueError: If one is not `Affine`.
        """
        soft: list[tuple[nn.Module, SoftRounding]] = []
        for module in modules:
            for name, weight, quantizer in list(quantized_weights(module)):
                if not isinstance(quantizer, Affine):
                    raise ValueError(
                        f"AdaRound trains the rounding of Affine, {name or 'a weight'} has "
                        f"{type(quantizer).__name__}; take rounding 'ste', or the quantizer "
                        "qat.quantizers.Affine"
                    )
                layer = module.get_submodule(name)
                layer.weight_quantizer = SoftRounding(weight, quantizer)
                soft.append((layer, layer.weight_quantizer))
        return Attachment(
            [{"params": [rounding.v], "lr": self.lr} for _, rounding in soft],
            penalty=partial(self._penalty, [rounding for _, rounding in soft]),
            close=partial(_round_for_good, soft),
        )

    def _penalty(self, soft: list[SoftRounding], progress: float) -> Tensor | None:
        if progress < 0.2 or not soft:
            return None
        sharpness = 2 + 18 * (1 - (progress - 0.2) / 0.8)
        penalties = [rounding.indecision(sharpness) for rounding in soft]
        return self.strength * torch.stack(penalties).sum()


def _round_for_good(soft: list[tuple[nn.Module, SoftRounding]]) -> None:
    for layer, rounding in soft:
        with torch.no_grad():
            layer.weight.copy_(rounding.rounded())  # type: ignore[operator]
        layer.weight_quantizer = rounding.quantizer

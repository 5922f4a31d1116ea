"""What a reconstruction trains: weights, their rounding, quantizer steps.

A set is a frozen value that says how; `attach` opens it on the modules of one stage, hands its
parameters to the optimizer, and `close` leaves plain modules behind.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat.layers import quantized_weights
from qat.quantizers import Affine, quantizers
from qat.spec import Operand

Modules = Iterable[nn.Module]


class Attachment:
    """A trainable set at work on one stage.

    Args:
        groups: Parameter groups of the optimizer.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.groups = groups

    def penalty(self, progress: float) -> Tensor | None:
        """A term of the loss that belongs to the set; `progress` runs from 0 to 1."""
        return None

    def after_step(self) -> None:
        """Keep the parameters where they may be."""

    def close(self) -> None:
        """Leave the stage as it is to be used."""


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


class _Steps(Attachment):
    def __init__(self, scales: list[nn.Parameter], lr: float) -> None:
        # Each scale moves in proportion to its size: they differ by orders of magnitude.
        self.floors = [(scale, SMALLEST_STEP * scale.detach().abs()) for scale in scales]
        super().__init__(
            [{"params": [s], "lr": lr * s.detach().abs().mean().item()} for s in scales]
        )

    @torch.no_grad()
    def after_step(self) -> None:
        for scale, floor in self.floors:
            torch.maximum(scale, floor, out=scale)


SMALLEST_STEP = 0.1
"""A step never falls below this share of its start."""


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
        scales = (getattr(q, "scale", None) for q in chosen)
        return _Steps([s for s in scales if isinstance(s, nn.Parameter)], self.lr)


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


class _Rounding(Attachment):
    def __init__(self, layers: list[nn.Module], lr: float, strength: float) -> None:
        self.layers, self.strength = layers, strength
        super().__init__([{"params": [s.v], "lr": lr} for s in self._soft()] if layers else [])

    def _soft(self) -> Iterator[SoftRounding]:
        for layer in self.layers:
            yield layer.weight_quantizer  # type: ignore[misc]

    def penalty(self, progress: float) -> Tensor | None:
        if progress < 0.2 or not self.layers:
            return None
        sharpness = 2 + 18 * (1 - (progress - 0.2) / 0.8)
        penalties = [soft.indecision(sharpness) for soft in self._soft()]
        return self.strength * torch.stack(penalties).sum()

    def close(self) -> None:
        for layer in self.layers:
            soft: SoftRounding = layer.weight_quantizer  # type: ignore[assignment]
            with torch.no_grad():
                layer.weight.copy_(soft.rounded())  # type: ignore[operator]
            layer.weight_quantizer = soft.quantizer


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
        """Put a `SoftRounding` in place of each uniform weight quantizer."""
        layers = []
        for module in modules:
            for name, weight, quantizer in list(quantized_weights(module)):
                if isinstance(quantizer, Affine):
                    layer = module.get_submodule(name)
                    layer.weight_quantizer = SoftRounding(weight, quantizer)
                    layers.append(layer)
        return _Rounding(layers, self.lr, self.strength)

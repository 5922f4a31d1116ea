"""Normalization layers: found by what they are, never by how a model names them.

The official suites pick layers by name (`blocks.9`, `layer4`) or by one class, and then adapt
nothing, or other layers than meant, on a model that names them otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def norm_layers(model: nn.Module, top: bool = True) -> list[tuple[str, nn.Module]]:
    """Names and normalization layers with trainable parameters, in the order of the modules.

    Args:
        model: The model.
        top: Include those of the last quarter of the model's stages and whatever follows. Stages
            are the equal modules in a row that hold most of the normalization (the blocks of a
            ViT), or else the children that hold any (the layers of a ResNet).
    """
    skipped = set() if top or not _num_norms(model) else _top(model)
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, NORMS)
        and next(module.parameters(recurse=False), None) is not None
        and module not in skipped
    ]


def norm_parameters(model: nn.Module, top: bool = True) -> list[str]:
    """Names of the weights and biases of the normalization layers.

    Raises:
        ValueError: If there is none, so that a method would adapt nothing.
    """
    names = [
        f"{layer}.{name}".lstrip(".")
        for layer, module in norm_layers(model, top)
        for name, _ in module.named_parameters(recurse=False)
    ]
    if not names:
        raise ValueError(
            "the model has no normalization layer with parameters, so there is nothing to adapt; "
            "use qat.tta.CoTTA(adapts_all=True), or a model with LayerNorm, GroupNorm or BatchNorm"
        )
    return names


def _top(model: nn.Module) -> set[nn.Module]:
    """Modules of the last quarter of the stages, and of what follows them."""
    stages = _stages(model)
    kept = stages[: len(stages) - max(1, len(stages) // 4)]
    below = {module for stage in kept for module in stage.modules()}
    for module in model.modules():  # a stem comes before the stages
        if module is stages[0]:
            break
        below.add(module)
    return {module for module in model.modules() if module not in below}


def _stages(model: nn.Module) -> list[nn.Module]:
    """The run of equal modules that holds most normalizations, else the children that hold any."""
    total = _num_norms(model)
    for module in model.modules():
        chain = list(module.children())
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(chain) > 1:
            alike = len({type(part) for part in chain}) == 1
            if alike and 2 * sum(map(_num_norms, chain)) > total:
                return chain
    stages = [child for child in model.children() if _num_norms(child)]
    return _stages(stages[0]) if len(stages) == 1 and list(stages[0].children()) else stages


def _num_norms(module: nn.Module) -> int:
    return sum(isinstance(part, NORMS) for part in module.modules())


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Batch normalizations by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@dataclass(frozen=True)
class BatchStatistics:
    """Lets batch normalizations use statistics of the batch, mixed with others.

    The layer's input is moved so that its frozen statistics, applied to what was moved, amount to
    the wanted ones; so the layer itself is not touched, and gradients pass through the statistics.

    Attributes:
        share: Share of the batch's own statistics, 0 to 1.
        means: Mean that makes up the rest, by layer; the layer's own where it is not named.
        variances: Variance, likewise.
        seen: Where the mixed statistics are left, `<layer>` to (mean, variance); None drops them.
    """

    share: float
    means: Mapping[str, Tensor] | None = None
    variances: Mapping[str, Tensor] | None = None
    seen: dict[str, tuple[Tensor, Tensor]] | None = None

    def __call__(self, model: nn.Module) -> None:
        """Put the hooks on a model."""
        for name, layer in batch_norms(model).items():
            layer.register_forward_pre_hook(self._mover(name))

    def _mover(self, name: str) -> Any:
        def move(layer: _BatchNorm, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            own_mean, own_variance = layer.running_mean, layer.running_var
            assert own_mean is not None and own_variance is not None
            base_mean = own_mean if self.means is None else self.means[name]
            base_variance = own_variance if self.variances is None else self.variances[name]
            axes = [axis for axis in range(inputs[0].ndim) if axis != 1]
            mean = torch.lerp(base_mean, inputs[0].mean(axes), self.share)
            variance = torch.lerp(base_variance, inputs[0].var(axes, correction=0), self.share)
            if self.seen is not None:
                self.seen[name] = (mean.detach(), variance.detach())
            return (restated(inputs[0], mean, variance, own_mean, own_variance, layer.eps),)

        return move


def restated(
    x: Float[Tensor, "n c ..."],
    mean: Float[Tensor, " c"],
    variance: Float[Tensor, " c"],
    own_mean: Float[Tensor, " c"],
    own_variance: Float[Tensor, " c"],
    eps: float,
) -> Float[Tensor, "n c ..."]:
    """`x` so that normalizing it by the own statistics normalizes `x` by the given ones."""
    factor = ((own_variance + eps) / (variance + eps)).sqrt()
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return x * factor.view(shape) + (own_mean - mean * factor).view(shape)

"""Metrics of one backward pass, from the gradient of each image: M1, M3, M4 and one between.

With g the gradient of log p(y) for one image, v a weight or activation and e = Q_b(v) - v, each as
one vector, Omega(b) is the mean over images of

    TaylorRemoval   M1   sum (g v)^2 * |e|^2 / |v|^2      removal error, times the share removed
    FirstOrder      M3   (g . e)^2                        first order in the true perturbation
    DiagonalFisher  M4   sum (g e)^2                      the same without cross terms
    TokenFisher          sum over tokens (g_t . e_t)^2    with those inside a token; weights as M4

With y drawn from the model's prediction, the expectation of M3 is twice the second-order term of
the divergence that quantization causes; M4 equals it where errors are independent of each other.
Those of an attention map are not: its small values all go to zero together, so M4 underrates maps
by a factor of three to four. TokenFisher keeps the terms inside a row of the map, and is steadier
than M3, which has one random direction an image.
For a weight the mean of M1 over images is n * s * |e|^2 / |v|^2, with s the mean of E[(g w)^2].

Provenance: *reconstruction*. The abstract of PMQ names a lightweight global metric without formula;
the Taylor removal error is that of Molchanov et al. (CVPR 2019), from memory.
"""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from qat.likelihood import check_target, log_likelihoods
from qat.quantizers.slots import Slot
from qat.search.probe import Probe
from qat.search.sensitivity import Metric, parts
from qat.spec import Operand

Gradients = Float[Tensor, "images tokens features"]
Values = Float[Tensor, "rows tokens features"]
"""The operand: a row for each image, or one for all images where it is a weight, whose output
channels are in place of tokens."""
Errors = Iterable[Float[Tensor, "rows tokens features"]]
"""What quantization adds to the operand, width by width, so that each stays in the cache."""


@dataclass(frozen=True)
class GradientMetric(Metric):
    """What the metrics of this file share: one backward pass, all slots and widths in it.

    Attributes:
        target: Whose likelihood is differentiated, see `qat.likelihood.log_likelihoods`.
        seed: Draws the targets.
        images_at_once: Images of a backward pass; bounds the memory.
    """

    target: str = "sampled"
    seed: int = 0
    images_at_once: int = 4

    def __post_init__(self) -> None:
        check_target(self.target)

    @property
    def needs_labels(self) -> bool:
        """True for the target `labels`."""
        return self.target == "labels"

    @abstractmethod
    def score(self, gradient: Gradients, value: Values, errors: Errors) -> Float[Tensor, " widths"]:
        """Sum of the images' sensitivities, at each width."""

    def score_weight(self, gradient: Gradients, value: Values, errors: Errors) -> Tensor:
        """The same for a weight."""
        return self.score(gradient, value, errors)

    def measure(
        self,
        model: nn.Module,
        probes: Mapping[Slot, Probe],
        images: Float[Tensor, "batch c h w"],
        labels: Int[Tensor, " batch"] | None,
    ) -> dict[Slot, dict[int, float]]:
        """Omega from one backward pass over all images."""
        generator = torch.Generator().manual_seed(self.seed)
        totals: dict[Slot, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        handles, num_images = [], 1

        def by_image(x: Tensor) -> Values:
            """A row for each image, of which the windows of an attention make several."""
            x = tokens_of(x)
            return x if len(x) % num_images else x.reshape(num_images, -1, x.shape[-1])

        for slot, probe in probes.items():
            if slot.operand is Operand.WEIGHT:
                add = partial(self._add, totals, slot, self.score_weight)
                layer: nn.Module = model.get_submodule(slot.module)
                errors = [e.flatten(1)[None] for e in probe.errors(layer.weight)]  # type: ignore
                handles.append(
                    layer.register_forward_hook(partial(_tap_layer, errors, by_image, add))
                )
            else:
                add = partial(self._add, totals, slot, self.score)
                handles.append(probe.register_forward_hook(partial(_tap_operand, by_image, add)))
        wanted = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        try:
            for batch, batch_labels in parts(images, labels, self.images_at_once):
                num_images = len(batch)
                with torch.enable_grad():
                    logits = model(batch.requires_grad_(True))
                    log_likelihoods(logits, self.target, batch_labels, generator).sum().backward()
        finally:
            for handle in handles:
                handle.remove()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(wanted[name])
        return {
            slot: dict(zip(probe.widths, (totals[slot] / len(images)).tolist(), strict=True))
            for slot, probe in probes.items()
        }

    def _add(
        self,
        totals: dict[Slot, Tensor],
        slot: Slot,
        score: Callable[[Gradients, Values, Errors], Tensor],
        gradient: Gradients,
        value: Values,
        errors: Errors,
    ) -> None:
        totals[slot] = totals[slot] + score(gradient, value, errors).double().cpu()


class TaylorRemoval(GradientMetric):
    """M1: the Taylor estimate of a removal's error, times the share that quantization removes."""

    def score(self, gradient: Gradients, value: Values, errors: Errors) -> Tensor:
        """Sum over images of `sum (g v)^2 * |e|^2 / |v|^2`."""
        removal = (gradient * value).square().sum((1, 2))
        energy = value.square().sum((1, 2)).clamp(min=1e-30)
        return torch.stack([(removal * e.square().sum((1, 2)) / energy).sum() for e in errors])


class FirstOrder(GradientMetric):
    """M3: the squared first-order change of the log-likelihood."""

    def score(self, gradient: Gradients, value: Values, errors: Errors) -> Tensor:
        """Sum over images of `(g . e)^2`."""
        return torch.stack([(gradient * e).sum((1, 2)).square().sum() for e in errors])


def diagonal(gradient: Gradients, value: Values, errors: Errors) -> Float[Tensor, " widths"]:
    """Sum over images of `sum (g e)^2`."""
    fisher = gradient.square()
    fisher = fisher.sum(0, keepdim=True) if len(value) == 1 else fisher
    return torch.stack([(e.square() * fisher).sum() for e in errors])


class DiagonalFisher(GradientMetric):
    """M4: squared errors weighted by the diagonal of the Fisher information."""

    def score(self, gradient: Gradients, value: Values, errors: Errors) -> Tensor:
        """Sum over images of `sum (g e)^2`."""
        return diagonal(gradient, value, errors)


class TokenFisher(GradientMetric):
    """M4 with the cross terms inside each token of an activation."""

    def score(self, gradient: Gradients, value: Values, errors: Errors) -> Tensor:
        """Sum over images of `sum over tokens (g_t . e_t)^2`."""
        return torch.stack([(gradient * e).sum(2).square().sum() for e in errors])

    def score_weight(self, gradient: Gradients, value: Values, errors: Errors) -> Tensor:
        """As in M4."""
        return diagonal(gradient, value, errors)


def tokens_of(x: Float[Tensor, "rows ... features"]) -> Values:
    """All but the first and the last axis as one, of size 1 where there are no others."""
    return rearrange(x, "rows ... features -> rows (...) features")


def _tap_operand(
    rows: Callable[[Tensor], Values],
    add: partial[None],
    probe: nn.Module,
    inputs: tuple[Tensor],
    out: Tensor,
) -> Tensor:
    """Once the gradient of an operand arrives, score it."""
    value = inputs[0].detach()
    out = out.view_as(out)  # the operand as this product reads it, whoever else does

    def arrived(gradient: Tensor) -> None:
        assert isinstance(probe, Probe)
        add(rows(gradient), rows(value), map(rows, probe.errors(value)))

    out.register_hook(arrived)  # the image has a gradient, so every operand has
    return out


def _tap_layer(
    errors: list[Tensor],
    rows: Callable[[Tensor], Values],
    add: partial[None],
    layer: nn.Module,
    inputs: tuple[Tensor],
    out: Tensor,
) -> None:
    """Once the gradient of a layer's output arrives, score its weight."""
    x, weight = inputs[0].detach(), layer.weight.detach()  # type: ignore[union-attr]

    def arrived(gradient: Tensor) -> None:
        is_linear = not hasattr(layer, "kernel_size")
        pair = (rows(x), rows(gradient)) if is_linear else (x, gradient)
        per_image = weight_gradients(layer, *pair)
        add(per_image, weight.flatten(1)[None], errors)  # type: ignore[operator]

    out.register_hook(arrived)


def weight_gradients(
    layer: nn.Module, x: Float[Tensor, "batch ..."], gradient: Float[Tensor, "batch ..."]
) -> Float[Tensor, "batch out inner"]:
    """Gradient of each image's likelihood with respect to the weight of a layer.

    Args:
        layer: A linear layer or a convolution, converted or not.
        x: Its input.
        gradient: Gradient with respect to its output.

    Raises:
        ValueError: If the layer is a grouped convolution.
    """
    if not hasattr(layer, "kernel_size"):
        return torch.einsum("bto,bti->boi", tokens_of(gradient), tokens_of(x))
    if layer.groups != 1:  # type: ignore[union-attr]
        raise ValueError(
            "gradient metrics know no grouped convolution; keep it out of the search by a plan "
            "rule without specs"
        )
    geometry = {key: getattr(layer, key) for key in ("dilation", "padding", "stride")}
    patches = F.unfold(x, layer.kernel_size, **geometry)  # type: ignore[arg-type]
    return torch.einsum("bol,bil->boi", gradient.flatten(2), patches)

"""RepQ-ViT: quantize with an expensive quantizer, run with a cheap one.

Li, Xiao, Yang, Gu. ICCV 2023. https://arxiv.org/abs/2212.08254

After each LayerNorm, x' = gamma xhat + beta is calibrated channel by channel, giving vectors s, z.
One scale and zero point for all channels follow from moving the difference into the neighbours:

    s~ = mean(s),   z~ = mean(z),   r1 = s / s~,   r2 = z - z~
    gamma <- gamma / r1             beta <- (beta + s r2) / r1
    W[:, d] <- r1[d] W[:, d]        b <- b - W (s r2)

The float model computes the same as before; x~ / s~ + z~ = x' / s + z, so even the codes are the
same, and all that is lost is lost in quantizing the new W. Attention maps take `LogSqrt2`, whose
odd codes cost one multiplication (`qat.quantizers.log`).

Modes: `code` is the official repository, in which z~ is a fraction; `paper` rounds it, as an
integer kernel must. The other difference, what becomes of small attention values, is the `zero` of
the quantizer: `extra` in the code, `none` in the paper.
Deviations: any LayerNorm is folded whose only reader is a linear layer, not those of named blocks;
a channel that is constant, or nearly, has a scale that does not vanish; the
reparametrized float model is compared with the original.
Provenance: the authors' code (commit a160561), read, not copied.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat.calibrate import calibrate_in_order, joined, observed_by, untouched_on_error
from qat.card import card_of
from qat.journal import Journal
from qat.layers import QuantLinear
from qat.models import example_inputs
from qat.quantizers import (
    Affine,
    ObserverFactory,
    PercentileMSE,
    Phase,
    Quantizer,
    quantizers,
    set_phase,
)
from qat.quantizers.percentile_mse import OFFICIAL
from qat.spec import Granularity, QuantSpec
from qat.trace import trace

CommonGrid = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From scales and zero points of the channels to one of each for all."""


def mean_grid(scales: Tensor, zero_points: Tensor) -> tuple[Tensor, Tensor]:
    """Mean scale and mean zero point, which is a fraction."""
    return scales.mean(), zero_points.mean()


def rounded_mean_grid(scales: Tensor, zero_points: Tensor) -> tuple[Tensor, Tensor]:
    """Mean scale and rounded mean zero point."""
    return scales.mean(), zero_points.mean().round()


SMALLEST_SHARE = 1e-4
"""Scales below this share of their mean are raised to it."""
LARGEST_GAP = 1e-3
"""Relative change of float logits that rounding can explain."""
MODES: dict[str, CommonGrid] = {"code": mean_grid, "paper": rounded_mean_grid}


@dataclass(frozen=True)
class Pair:
    """A LayerNorm, and the only layer that reads its output.

    Attributes:
        name: Name of the layer.
        norm: The LayerNorm.
        linear: The layer, with quantizers of weight and input.
        own: The quantizer of the layer's input, for which another may stand in.
    """

    name: str
    norm: nn.LayerNorm
    linear: QuantLinear
    own: Quantizer


@dataclass(frozen=True)
class RepQViT:
    """The initialiser: calibrate, reparametrize, calibrate the changed weights again.

    Attributes:
        mode: `code` as the official repository, `paper` with an integer common zero point.
        per_token: Weight the error of each token by its inverse energy in the search of ranges, and
            try narrower ones on three bits and fewer; not part of the paper, see `PercentileMSE`.
    """

    mode: Literal["code", "paper"] = "code"
    per_token: bool = False

    def __call__(
        self, model: nn.Module, batches: Iterable[Tensor], journal: Journal | None = None
    ) -> None:
        """Initialise a converted model; all batches count as one.

        Raises:
            ValueError: If the images are not finite, or the model has no LayerNorm whose output
                can be reparametrized.
        """
        images = joined(batches)
        found = {"per_token": True} if self.per_token else {"fractions": OFFICIAL}
        observer = partial(PercentileMSE, **found)
        with untouched_on_error(model):
            pairs = calibrate_channels(model, images, observer, journal)
            reparametrize_norms(model, images, pairs, MODES[self.mode], observer)


@torch.no_grad()
def calibrate_channels(
    model: nn.Module,
    images: Float[Tensor, "batch ..."],
    observer: ObserverFactory,
    journal: Journal | None = None,
) -> list[Pair]:
    """Calibrate every quantizer in order, those behind LayerNorms with a scale for each channel.

    The latter are put in place of the inputs' own quantizers; `reparametrize_norms` brings the
    own ones back, from the pairs that this returns.

    Raises:
        ValueError: If the numbers of the model are too coarse to be folded.
    """
    if (dtype := card_of(model).dtype).itemsize < 4:
        raise ValueError(
            f"reparametrization folds scales into weights, which rounds those of {dtype} by whole "
            "percents; quantize model.float()"
        )
    set_phase(model, Phase.FLOAT)
    pairs = norm_pairs(model, journal)
    for pair in pairs:
        spec = QuantSpec(max(2, pair.own.spec.bits), False, Granularity.PER_CHANNEL)
        channels = Affine(spec, pair.own.shape, pair.own.operand, observer=observer)
        pair.linear.input_quantizer = channels.to(pair.linear.weight)
    with observed_by(model, observer):
        calibrate_in_order(model, images)
    return pairs


@torch.no_grad()
def reparametrize_norms(
    model: nn.Module,
    images: Float[Tensor, "batch ..."],
    pairs: list[Pair],
    common_grid: CommonGrid,
    observer: ObserverFactory,
) -> None:
    """Fold the channel-wise grids into norms and layers, and calibrate what that has changed.

    Args:
        model: The model, as `calibrate_channels` has left it.
        images: Calibration images.
        pairs: What `calibrate_channels` has returned.
        common_grid: Chooses the one grid for all channels.
        observer: Chooses the ranges of what is calibrated again.

    Raises:
        ValueError: If the float model does not compute what it did before.
    """
    sample = images[:2]
    before = _float_logits(model, sample)
    for pair in pairs:
        _fold(pair, common_grid)
    with observed_by(model, observer):
        calibrate_in_order(model, images)
    smallest = torch.finfo(before.dtype).tiny  # a fresh classifier may give nothing but zeros
    gap = (_float_logits(model, sample) - before).norm() / before.norm().clamp(min=smallest)
    if not gap < LARGEST_GAP:
        raise ValueError(
            f"reparametrization changes the float logits by {gap:.1%}: something between a "
            "LayerNorm and its linear layer, such as padding to whole windows, is not linear in "
            "it; use an image size without padding, or ptq_init.percentile_mse"
        )


def norm_pairs(model: nn.Module, journal: Journal | None = None) -> list[Pair]:
    """Every LayerNorm whose only reader is a linear layer that quantizes its input by one scale.

    Readers are found by a trace. Between both, values may change their places only.

    Args:
        model: A converted model.
        journal: Is told how many of the LayerNorms these are.

    Raises:
        ValueError: If there is none.
    """
    found = []
    traced = trace(model, example_inputs(model)).readers
    for name, readers in traced.items():
        norm: Any = model.get_submodule(name)
        linear: Any = model.get_submodule(readers[0]) if len(readers) == 1 and readers[0] else None
        own = getattr(linear, "input_quantizer", None)
        if (
            norm.elementwise_affine
            and norm.bias is not None
            and norm.normalized_shape == (getattr(linear, "in_features", None),)
            and isinstance(own, Quantizer)
            and own.spec.granularity is Granularity.PER_TENSOR
        ):
            found.append(Pair(str(readers[0]), norm, linear, own))
    if not found:
        raise ValueError(
            f"no LayerNorm to reparametrize: the model runs {len(traced)}, none of them read by a "
            "single linear layer and nothing else, with a per-tensor quantizer on that layer's "
            "input; use ptq_init.percentile_mse for this model or plan"
        )
    if journal is not None:
        journal.note("norms_folded", len(found))
        journal.note("norms", len(traced))
    return found


def reparametrize(
    norm: nn.LayerNorm,
    linear: QuantLinear,
    scales: Float[Tensor, " dim"],
    zero_points: Float[Tensor, " dim"],
    scale: Float[Tensor, ""],
    zero_point: Float[Tensor, ""],
) -> None:
    """Move the difference between the channels' grids and one grid into norm and layer.

    Afterwards `x / scale + zero_point` is what `x / scales + zero_points` was, and the layer's
    output is unchanged. A layer without bias is given one.
    """
    gain = scales / scale
    shift = scales * (zero_points - zero_point)
    norm.weight.div_(gain)
    norm.bias.add_(shift).div_(gain)
    if linear.bias is None:
        linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
    linear.bias.sub_(linear.weight @ shift)
    linear.weight.mul_(gain)


def _fold(pair: Pair, common_grid: CommonGrid) -> None:
    """Reparametrize one pair; its weight quantizer, and perhaps its input's, start anew."""
    own, channels = pair.own, pair.linear.input_quantizer
    assert isinstance(channels, Affine)
    scales, zero_points = _usable(channels)
    scale, zero_point = common_grid(scales, zero_points)
    if isinstance(own, Affine) and not own.spec.signed:
        own.set_grid(scale, zero_point)
        own.phase = Phase.QUANTIZE
    else:  # a grid around zero: place the channels so that it fits, and let it find its own scale
        zero_point = torch.full_like(zero_point, 2.0 ** (channels.spec.bits - 1))
        own.phase = Phase.FLOAT
    reparametrize(pair.norm, pair.linear, scales, zero_points, scale, zero_point)
    pair.linear.input_quantizer = own
    if pair.linear.weight_quantizer is not None:
        pair.linear.weight_quantizer.phase = Phase.FLOAT


def _usable(channels: Affine) -> tuple[Tensor, Tensor]:
    """Scales and zero points, without the vanishing scale of a channel that is nearly constant."""
    scales, zero_points = channels.scale.detach(), channels.zero_point
    floored = scales.clamp(min=SMALLEST_SHARE * scales.mean().item())
    return floored, torch.where(
        floored > scales, (zero_points * scales / floored).round(), zero_points
    )


def _float_logits(model: nn.Module, images: Tensor) -> Tensor:
    """What the model computes without its quantizers."""
    found = [quantizer for _, quantizer in quantizers(model)]
    phases = [quantizer.phase for quantizer in found]
    set_phase(model, Phase.FLOAT)
    logits = model(images)
    for quantizer, phase in zip(found, phases, strict=True):
        quantizer.phase = phase
    return logits

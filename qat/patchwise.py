"""PMQ's patch-wise module: a layer's activation bits, re-allocated over the patches of an image.

In every layer the patches are ranked; the top share of them gets `up` bits more than the layer's
plan says, the others `down` bits less, so that the mean does not rise:

    share * up <= (1 - share) * down
    range of the grid   that of the layer's calibrated quantizer, for every patch
    step of b bits      range / (2^b - 1);  zero point scaled alike

Rankings r of patch j, from the attention map A of a layer, before it is quantized:

    ClassAttention    P1   mean over heads of A[cls, j]; without a class token the column mean
    RandomOrder            at random, anew for every map, to compare with
    Inverse                the other way round, to compare with

Class and other prefix tokens always count among the top. Order of causes: the map of layer l ranks
its own value vectors, projection and MLP, and the qkv layer, queries and keys of layer l + 1. What
comes before the first map keeps its uniform bits, as do attention maps, whose rows are no patches,
and one-bit operands.

It acts at inference, on a calibrated model: `with patchwise(model, bits): ...`; within the block
`qat.cost.count.cost` counts the mean bits. Checkpoints hold the model without it.

Provenance: *reconstruction*. The abstract has the module, not its formula; ranking by the attention
of the class token is that of EViT (Liang et al., ICLR 2022, its official code).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from qat import ops
from qat.layers import QuantMatmul
from qat.quantizers import Affine, Codes, Phase, Quantizer, quantizers
from qat.quantizers.lsq import LSQ
from qat.quantizers.slots import slot_of
from qat.spec import Operand, QuantSpec

OPERANDS = (Operand.INPUT, Operand.QUERY, Operand.KEY, Operand.VALUE)
Scores = Float[Tensor, "batch tokens"]


class Ranking(ABC):
    """Importance of patches from an attention map; subclasses are frozen dataclasses."""

    @abstractmethod
    def scores(
        self, attention: Float[Tensor, "batch heads rows tokens"], num_prefix: int, number: int
    ) -> Scores:
        """A score for each token, prefix tokens included; the greater, the more important.

        Args:
            attention: The map, not yet quantized.
            num_prefix: Class and other prefix tokens, which come first.
            number: Which map this is, of all those since the patch-wise bits were put on.
        """


@dataclass(frozen=True)
class ClassAttention(Ranking):
    """P1: how much the class token attends to each patch, or all tokens where there is none."""

    def scores(self, attention: Tensor, num_prefix: int, number: int) -> Scores:
        """Mean over heads of the class token's row, or of all rows."""
        rows = attention[:, :, :1] if num_prefix else attention
        return rows.mean((1, 2))


@dataclass(frozen=True)
class RandomOrder(Ranking):
    """At random, anew for every map: the seed and the number of the map decide, nothing else.

    Attributes:
        seed: Draws the orders, together with the number of the map; not negative.
    """

    seed: int = 0

    def scores(self, attention: Tensor, num_prefix: int, number: int) -> Scores:
        """Uniform random numbers."""
        generator = np.random.default_rng((self.seed, number))
        drawn = generator.random((len(attention), attention.shape[-1]))
        return torch.from_numpy(drawn).to(attention)


@dataclass(frozen=True)
class Inverse(Ranking):
    """The opposite of the ranking `of`."""

    of: Ranking = ClassAttention()

    def scores(self, attention: Tensor, num_prefix: int, number: int) -> Scores:
        """Its scores, negated."""
        return -self.of.scores(attention, num_prefix, number)


@dataclass(frozen=True)
class PatchBits:
    """How the bits of a layer are spread over its patches.

    Attributes:
        up: Bits that the top patches get beyond the layer's.
        down: Bits that the others lose.
        share: Share of tokens in the top, prefix tokens included, rounded down.
        ranking: Says which patches are on top.
        first_block: Blocks before this one keep their uniform bits.

    Raises:
        ValueError: If the mean of the bits would rise, or nothing would change.
    """

    up: int = 1
    down: int = 1
    share: float = 0.5
    ranking: Ranking = ClassAttention()
    first_block: int = 0

    def __post_init__(self) -> None:
        if self.up < 0 or self.down < 1 or not 0 < self.share < 1:
            raise ValueError(
                "PatchBits needs up of at least 0, down of at least 1 and a share between 0 and 1, "
                f"got {self.up}, {self.down} and {self.share}"
            )
        if self.share * self.up > (1 - self.share) * self.down + 1e-9:
            most = self.down / (self.up + self.down)
            raise ValueError(
                f"PatchBits must not raise the mean: {self.share:.0%} of the patches {self.up} "
                f"bits up and the rest {self.down} down does; lower the share to {most:.3f}"
            )

    def num_top(self, num_tokens: int, num_prefix: int) -> int:
        """Number of tokens in the top, all prefix tokens among them."""
        return max(num_prefix, math.floor(self.share * num_tokens))

    def mean(self, bits: int, num_tokens: int, num_prefix: int) -> float:
        """Mean width over the tokens of an image, where the layer's is `bits`."""
        top = self.num_top(num_tokens, num_prefix)
        return bits - self.down + (self.up + self.down) * top / num_tokens

    def top(
        self, attention: Tensor, num_prefix: int, number: int = 0
    ) -> Bool[Tensor, "batch tokens"]:
        """Which tokens are on top; arguments as in `Ranking.scores`."""
        scores = self.ranking.scores(attention, num_prefix, number).clone()
        scores[:, :num_prefix] = math.inf
        count = self.num_top(scores.shape[1], num_prefix)
        chosen = scores.topk(count, dim=1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


class Current:
    """The tokens on top, by the latest attention map of the forward pass that is under way.

    Attributes:
        num_maps: Maps so far, in all forward passes since the patch-wise bits were put on.
        top: By the last of them.
    """

    def __init__(self) -> None:
        self.num_maps = 0
        self.top: Tensor | None = None


class PatchQuantizer(Quantizer):
    """Stands in for a calibrated quantizer and gives tokens on top more levels in its range.

    Args:
        own: The quantizer it stands in for.
        bits: The spread.
        current: Where the ranking is read.
        num_prefix: Class and other prefix tokens.
        num_tokens: Tokens of an image.
    """

    supported_bits = range(2, 17)

    def __init__(
        self, own: Affine | LSQ, bits: PatchBits, current: Current, num_prefix: int, num_tokens: int
    ) -> None:
        super().__init__(own.spec, own.shape, own.operand)
        self.own, self.bits, self.current = own, bits, current
        self.num_prefix, self.num_tokens = num_prefix, num_tokens
        self.phase = own.phase
        widths = (own.spec.bits + bits.up, max(1, own.spec.bits - bits.down))
        if widths[1] < 2 or widths[0] > 16:
            raise ValueError(
                f"patches of {widths[0]} and {own.spec.bits - bits.down} bits do not exist; lower "
                f"PatchBits.up or down, or give the layer another width than {own.spec.bits}"
            )
        self.high, self.low = (QuantSpec(b, own.spec.signed) for b in widths)

    @property
    def mean_bits(self) -> float:
        """Mean width over the tokens of an image."""
        return self.bits.mean(self.spec.bits, self.num_tokens, self.num_prefix)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Each token on its grid."""
        top = self.current.top
        assert top is not None, "an attention map comes first"
        high, low = self._on(self.high, x), self._on(self.low, x)
        # Tokens are the last axis but one, in vectors of heads as in inputs of layers.
        shape = (len(x), *(1 for _ in range(x.ndim - 3)), -1, 1)
        return torch.where(top.view(shape), high, low)

    def _on(self, spec: QuantSpec, x: Tensor) -> Tensor:
        """The operand on a grid of other levels in the same range."""
        own = self.own
        ratio = own.spec.qmax / spec.qmax
        offset = own.zero_point / ratio if isinstance(own, Affine) and not spec.signed else None
        return ops.fake_quantize(x, own.scale.abs() * ratio, offset, spec.qmin, spec.qmax)

    def observe(self, x: Tensor) -> None:
        """Refused: it stands in for a quantizer that is calibrated."""
        raise RuntimeError("calibrate the model before patch-wise bits are put on it")

    def freeze(self) -> None:
        """Nothing to do."""

    forget = freeze

    def encode(self, x: Tensor) -> Codes:
        """Refused: the codes of a tensor with two grids are no single table."""
        raise NotImplementedError("patch-wise bits act at inference; export the model without them")


@contextmanager
def patchwise(model: nn.Module, bits: PatchBits) -> Iterator[nn.Module]:
    """Let a calibrated ViT run with patch-wise bits within the block.

    Args:
        model: A converted and calibrated model with timm's plain attention.
        bits: The spread of bits over patches.

    Raises:
        ValueError: If the model has other attention, whose tokens change their places from layer
            to layer (Swin), or is not calibrated, or a width does not exist.
    """
    products = ((name, getattr(module, "av", None)) for name, module in model.named_modules())
    blocks = ((name, product) for name, product in products if name.startswith("blocks."))
    maps = {name: product for name, product in blocks if isinstance(product, QuantMatmul)}
    if not maps or any(q.phase is not Phase.QUANTIZE for _, q in quantizers(model)):
        raise ValueError(
            "patch-wise bits need a calibrated ViT with both attention products quantized; "
            "convert it with a plan that has query, key, attention and value, and calibrate it"
        )
    num_prefix = int(getattr(model, "num_prefix_tokens", 0))
    num_tokens = int(model.patch_embed.num_patches) + num_prefix  # type: ignore[union-attr]
    current = Current()
    own = dict(_ranked(model, next(iter(maps)), bits.first_block))
    if not own:
        raise ValueError(
            f"no operand of patches from block {bits.first_block} on: the model has "
            f"{len(maps)} blocks, numbered from 0; lower PatchBits.first_block"
        )
    parts = {
        path: PatchQuantizer(q, bits, current, num_prefix, num_tokens) for path, q in own.items()
    }

    def rank(_: nn.Module, operands: tuple[Tensor, Tensor]) -> None:
        current.top = bits.top(operands[0].detach(), num_prefix, current.num_maps)
        current.num_maps += 1

    handles = [product.register_forward_pre_hook(rank) for product in maps.values()]
    for path, part in parts.items():
        model.set_submodule(path, part)
    try:
        yield model
    finally:
        for path, quantizer in own.items():
            model.set_submodule(path, quantizer)
        for handle in handles:
            handle.remove()


def _ranked(model: nn.Module, first: str, first_block: int) -> Iterator[tuple[str, Affine | LSQ]]:
    """The quantizers of patches behind the map of the `first` attention, in the model's order."""
    for path, quantizer in quantizers(model):
        slot = slot_of(path, quantizer)
        before = (slot.module == first and slot.operand is not Operand.VALUE) or (
            slot.module == f"{first}.qkv"
        )
        # Outside the blocks are the image, and what is behind the pooling of tokens.
        outside = not path.startswith("blocks.") or int(path.split(".")[1]) < first_block
        per_tensor = not quantizer.spec.scale_shape(quantizer.shape)
        if slot.operand in OPERANDS and not before and not outside and quantizer.spec.bits > 1:
            if not isinstance(quantizer, Affine | LSQ) or not per_tensor:
                raise ValueError(
                    f"{path} is a {type(quantizer).__name__} with its own kind of grid; patch-wise "
                    "bits divide the range of Affine or LSQ quantizers with one scale"
                )
            yield path, quantizer

"""How the field counts: conventions behind published ratios, and which of them fit a claim.

Papers divide the cost of the float model by that of the low-bit one, under conventions they seldom
state. With F the MACs of products in float and B the BOPs of the others,

    OPs = (1 or 2) * F + (1 or 2) * B / (64 or 32)

and the products of attention, or the patch embedding, may or may not count among the low-bit ones.
A size may leave out position embeddings, normalization, biases or quantizer state, and assume other
widths for patch embedding and classifier. With so many conventions a near hit is expected by
chance, so a match is no proof; what is ours is the formula of `qat.cost.count`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

from qat.cost.count import FLOAT_BITS, Cost, Site


@dataclass(frozen=True)
class Count:
    """One convention and the ratio it gives.

    Attributes:
        convention: What is counted, in words.
        value: Operations, or bytes, of the low-bit model.
        ratio: The float model's count divided by it.
    """

    convention: str
    value: float
    ratio: float


@dataclass(frozen=True)
class Claim:
    """Published ratios of a binary model against its float original.

    Attributes:
        source: Where the claim stands.
        model: timm name of the original.
        size_ratio: Published ratio of sizes.
        ops_ratio: Published ratio of operations.
    """

    source: str
    model: str
    size_ratio: float
    ops_ratio: float


CLAIMS = (Claim("BinaryViT, arXiv 2305.14730, abstract", "deit_small_patch16_224", 16.2, 17.7),)


def plain_ops(cost: Cost) -> Count:
    """The plain reading: OPs = FLOPs + BOPs / 64 with one FLOP a MAC."""
    return next(ops_counts(cost))


def ops_counts(cost: Cost) -> Iterator[Count]:
    """Operations under every convention, the plain reading first."""
    attention = {
        "products as planned": (),
        "A V in float": (".av",),
        "both products in float": (".qk", ".av"),
    }
    patch = {"": (), ", patch embedding binary": ("patch_embed.proj",)}
    axes = product((64, 32), (1, 2), (1, 2), attention.items(), patch.items())
    for divisor, float_factor, low_factor, (words, floats), (patch_words, binary) in axes:
        value = 0.0
        for site in cost.sites:
            low = site.low_bit and not site.name.endswith(floats or ("\0",))
            bops = site.macs if site.name in binary else site.bops
            if low or site.name in binary:
                value += low_factor * bops / divisor
            else:
                value += float_factor * site.macs
        text = f"{float_factor} x FLOPs + {low_factor} x BOPs/{divisor}, {words}{patch_words}"
        yield Count(text, value, float_factor * cost.macs / value)


def size_counts(cost: Cost) -> Iterator[Count]:
    """Bytes under every convention, our own first."""
    float_bytes = 4 * sum(site.num_weights for site in cost.sites) + 4 * sum(
        count for group, count in cost.num_other.items() if group != "quantizer"
    )
    groups = {**cost.num_other, "weight scales": sum(site.num_scales for site in cost.sites)}
    groups = {name: count for name, count in groups.items() if count}
    outer = [site for site in cost.sites if site.num_weights and not site.low_bit]
    inner = sum(site.num_weights * site.bits[1] for site in cost.sites if site.low_bit)
    for widths in product((FLOAT_BITS, 16, 8, 1), repeat=len(outer)):
        for kept in range(len(groups), -1, -1):
            for names in combinations(groups, kept):
                bits = inner + sum(_bits(s, w) for s, w in zip(outer, widths, strict=True))
                value = (bits + FLOAT_BITS * sum(groups[name] for name in names)) / 8
                layers = ", ".join(f"{s.name} {w} bit" for s, w in zip(outer, widths, strict=True))
                text = f"{layers}; counted beside weights: {', '.join(names) or 'nothing'}"
                yield Count(text, value, float_bytes / value)


def matches(counts: Iterator[Count], published: float) -> tuple[list[Count], int]:
    """The conventions whose ratio rounds to a published one-decimal figure, and how many there are.

    Returns:
        The matching conventions, or the three nearest if none match; and the number tried.
    """
    tried = sorted(counts, key=lambda count: abs(count.ratio - published))
    return [c for c in tried if round(c.ratio, 1) == published] or tried[:3], len(tried)


def _bits(site: Site, width: int) -> int:
    return site.num_weights * width

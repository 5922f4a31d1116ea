"""Published ratios: the plain reading, every other convention, and what fits a claim."""

from pathlib import Path

import pytest
import timm

import qat
from binaryvit import BinaryQuantizers
from qat import Plan
from qat.cost.conventions import CLAIMS, Count, matches, ops_counts, plain_ops, size_counts
from qat.cost.count import Cost, Site, cost
from qat.quantizers import LSQ
from tests.conftest import make_tiny_vit

PLAN = Path(__file__).parents[3] / "configs" / "plans" / "vit_binary.yaml"

# A model of one product in float, one on one bit, and both products of attention.
TOY = Cost(
    (
        Site("patch_embed.proj", "Conv2d", 1000, (32, 32), 100),
        Site("layer", "QuantLinear", 6400, (1, 1), 800, 10),
        Site("attn.qk", "product", 640, (1, 1)),
        Site("attn.av", "product", 1280, (1, 1)),
    ),
    {"position": 20, "norm": 0, "bias": 8, "quantizer": 4, "other": 0},
    (),
)


@pytest.fixture(scope="module")
def deit_small() -> Cost:
    """Cost of DeiT-S under the shipped binary plan."""
    model = qat.timm_model("deit_small_patch16_224")
    qat.convert_(model, Plan.load(PLAN), BinaryQuantizers())
    return cost(model)


def test_plain_operations_of_binary_deit_small_are_129_million(deit_small: Cost) -> None:
    in_float = 57_802_752 + 384_000  # patch embedding and head
    binary = 4_598_882_304 - in_float
    found = plain_ops(deit_small)
    assert found.value == in_float + binary / 64 == 129_135_120
    assert found.ratio == 4_598_882_304 / 129_135_120
    assert (round(found.value / 1e6, 1), round(found.ratio, 1)) == (129.1, 35.6)


def test_no_convention_gives_the_published_17_7_of_operations(deit_small: Cost) -> None:
    ratios = [count.ratio for count in ops_counts(deit_small)]
    assert len(ratios) == 2 * 2 * 2 * 3 * 2
    assert 17.7 not in [round(ratio, 1) for ratio in ratios]
    nearest, tried = matches(ops_counts(deit_small), 17.7)
    assert tried == 48
    assert [round(count.ratio, 2) for count in nearest] == [16.96, 18.52, 18.52]


def test_several_conventions_give_the_published_16_2_of_sizes(deit_small: Cost) -> None:
    found, tried = matches(size_counts(deit_small), 16.2)
    # Four widths of two outer layers, and every choice among five groups of state.
    assert tried == 4**2 * 2**5
    assert len(found) > 1
    assert {round(count.ratio, 1) for count in found} == {16.2}
    # One of them by hand: binary weights, the outer layers and the normalization at 32 bits.
    norm_only = 21_233_664 / 8 + 4 * (294_912 + 384_000 + 19_200)
    assert norm_only in [count.value for count in found]
    assert 4 * 22_050_664 / norm_only == pytest.approx(16.194, abs=1e-3)


def test_first_size_convention_is_our_own_formula(deit_small: Cost) -> None:
    ours = next(size_counts(deit_small))
    assert ours.value == deit_small.size_bytes
    assert ours.ratio == 4 * 22_050_664 / deit_small.size_bytes


def test_operations_of_every_convention_on_a_toy_equal_a_hand_count() -> None:
    found = {count.convention: (count.value, count.ratio) for count in ops_counts(TOY)}
    total = 1000 + 6400 + 640 + 1280
    expected = {
        "1 x FLOPs + 1 x BOPs/64, products as planned": (1000 + 8320 / 64, 1),
        "1 x FLOPs + 2 x BOPs/64, products as planned": (1000 + 2 * 8320 / 64, 1),
        "2 x FLOPs + 1 x BOPs/64, products as planned": (2000 + 8320 / 64, 2),
        "1 x FLOPs + 1 x BOPs/32, products as planned": (1000 + 8320 / 32, 1),
        "1 x FLOPs + 1 x BOPs/64, A V in float": (1000 + 1280 + 7040 / 64, 1),
        "1 x FLOPs + 1 x BOPs/64, both products in float": (1000 + 1920 + 6400 / 64, 1),
        "1 x FLOPs + 1 x BOPs/64, products as planned, patch embedding binary": (9320 / 64, 1),
        "2 x FLOPs + 2 x BOPs/32, both products in float, patch embedding binary": (
            2 * 1920 + 2 * 7400 / 32,
            2,
        ),
    }
    for convention, (value, factor) in expected.items():
        assert found[convention] == (value, factor * total / value), convention
    assert next(iter(found)) == "1 x FLOPs + 1 x BOPs/64, products as planned"
    assert len(found) == 48  # every convention is told from every other


def test_sizes_of_every_convention_on_a_toy_equal_a_hand_count() -> None:
    found = {count.convention: (count.value, count.ratio) for count in size_counts(TOY)}
    original = 4 * (100 + 800 + 20 + 8)
    everything = "position, bias, quantizer, weight scales"
    expected = {
        f"patch_embed.proj 32 bit; counted beside weights: {everything}": 100 + 400 + 4 * 42,
        f"patch_embed.proj 16 bit; counted beside weights: {everything}": 100 + 200 + 4 * 42,
        "patch_embed.proj 8 bit; counted beside weights: bias, quantizer": 100 + 100 + 4 * 12,
        "patch_embed.proj 1 bit; counted beside weights: nothing": 100 + 12.5,
    }
    for convention, value in expected.items():
        assert found[convention] == (value, original / value), convention
    assert len(found) == 4 * 2**4


def test_plain_operations_weigh_more_bits_by_their_product() -> None:
    model = make_tiny_vit()
    rules = [{"pattern": "blocks.*.mlp.*", "weight": {"bits": 4}, "input": {"bits": 8}}]
    qat.convert_(model, Plan.from_list(rules), LSQ)
    found = cost(model)
    low = 2 * 17 * 2 * 64 * 256  # two blocks, 17 tokens, two layers between widths 64 and 256
    assert plain_ops(found).value == found.macs - low + low * 4 * 8 / 64


def test_matches_are_all_that_round_to_the_figure_nearest_first() -> None:
    counts = [Count(str(r), 1.0, r) for r in (2.06, 1.949, 2.04, 1.96, 3.0)]
    found, tried = matches(iter(counts), 2.0)
    assert tried == 5
    assert {count.ratio for count in found} == {2.04, 1.96}


def test_the_three_nearest_are_given_where_nothing_matches() -> None:
    counts = [Count(str(r), 1.0, r) for r in (9.0, 2.3, 1.0, 1.8, -4.0)]
    found, tried = matches(iter(counts), 2.0)
    assert tried == 5
    assert [count.ratio for count in found] == [1.8, 2.3, 1.0]


def test_claims_are_of_models_that_timm_has() -> None:
    assert {claim.model for claim in CLAIMS} <= set(timm.list_models())

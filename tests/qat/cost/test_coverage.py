"""Tables and lines of the report: what stays in float and why, totals, published claims."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import qat
from binaryvit import BinaryQuantizers
from qat import Plan
from qat.cost.count import Cost, cost
from qat.cost.coverage import (
    claim_lines,
    cost_items,
    coverage_lines,
    coverage_table,
    kept_in_float,
    plan_table,
    totals_table,
)
from qat.quantizers import LSQ
from tests.conftest import make_tiny_vit
from tests.qat.common import converted, plan

PLAN = Path(__file__).parents[3] / "configs" / "plans" / "vit_binary.yaml"
LAYER = {"weight": {"bits": 4, "granularity": "per_channel"}, "input": {"bits": 4}}


def rows_of(table: Table) -> list[list[str]]:
    """Cells of a table as it is printed, heading first."""
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines]
    return [row for row in rows if row]


def by_rules(*rules: dict[str, Any]) -> nn.Module:
    """The tiny ViT under LSQ and these rules."""
    model = make_tiny_vit()
    qat.convert_(model, Plan.from_list(list(rules)), LSQ)
    return model


@pytest.fixture(scope="module")
def float_deit() -> Cost:
    """Cost of DeiT-S in float."""
    return cost(qat.timm_model("deit_small_patch16_224"))


@pytest.fixture(scope="module")
def binary_deit() -> Cost:
    """Cost of DeiT-S under the shipped binary plan."""
    model = qat.timm_model("deit_small_patch16_224")
    qat.convert_(model, Plan.load(PLAN), BinaryQuantizers())
    return cost(model)


def test_coverage_gives_the_shares_of_every_precision_largest_first(tiny_vit: nn.Module) -> None:
    heading, *rows = rows_of(coverage_table(cost(converted(tiny_vit, "lsq"))))
    assert heading == ["precision", "MACs", "weights", "where"]
    # Of 1,749,888 MACs the layers of the blocks have 2 * 835,584, the products 2 * 36,992 and the
    # rest 4,736; of 99,200 weights the blocks have 98,304.
    assert rows == [
        ["w4a4", "95.50%", "99.10%", "8 products, such as blocks.0.attn.qkv"],
        ["a4a4", "4.23%", "0.00%", "4 products, such as blocks.0.attn.qk"],
        ["float", "0.27%", "0.90%", "2 products, such as patch_embed.proj"],
    ]


def test_coverage_of_a_float_model_is_one_row_of_everything(tiny_vit: nn.Module) -> None:
    found = cost(tiny_vit)
    assert rows_of(coverage_table(found))[1:] == [
        ["float", "100.00%", "100.00%", "14 products, such as patch_embed.proj"]
    ]
    assert coverage_lines(tiny_vit, found) == []


def test_layer_that_no_rule_matches_is_kept_for_that_reason(tiny_vit: nn.Module) -> None:
    converted(tiny_vit, "lsq")
    found = kept_in_float(tiny_vit, cost(tiny_vit))
    reason = "no rule of the plan matches it"
    assert found == {"patch_embed.proj": reason, "head": reason}


def test_layer_kept_by_a_rule_has_the_reason_that_the_rule_states() -> None:
    model = by_rules(
        {"pattern": "head", "reason": "few weights, much harm"},
        {"pattern": "patch_embed.*"},
        plan().to_list()[0],
        {"pattern": "blocks.*", **LAYER},
    )
    assert kept_in_float(model, cost(model)) == {
        "patch_embed.proj": "rule 'patch_embed.*' gives it no spec",
        "head": "few weights, much harm",
    }


def test_product_with_an_operand_in_float_is_listed_with_its_rule() -> None:
    bits = {"bits": 4}
    model = by_rules(
        {"pattern": "blocks.0.attn", "query": bits, "key": bits},
        {"pattern": "blocks.1.attn", "query": bits, "key": {"bits": 16}, "value": bits},
        {"pattern": "blocks.0.mlp.fc1", "weight": bits},
        {"pattern": "*", **LAYER},
    )
    found = cost(model)
    assert kept_in_float(model, found) == {
        "blocks.0.attn.av": "rule 'blocks.0.attn' leaves an operand at 32 bits",
        "blocks.0.mlp.fc1": "rule 'blocks.0.mlp.fc1' leaves an operand at 32 bits",
        "blocks.1.attn.qk": "rule 'blocks.1.attn' leaves an operand at 16 bits",
        "blocks.1.attn.av": "rule 'blocks.1.attn' leaves an operand at 32 bits",
    }
    assert coverage_lines(model, found) == [
        f"not below 16 bits: {name}: {reason}"
        for name, reason in kept_in_float(model, found).items()
    ]


def test_products_of_attention_that_no_rule_matches_are_listed() -> None:
    model = by_rules({"pattern": "blocks.*.mlp.*", **LAYER})
    found = kept_in_float(model, cost(model))
    attention = [f"blocks.{i}.attn{part}" for i in (0, 1) for part in (".qkv", ".proj")]
    products = [f"blocks.{i}.attn{part}" for i in (0, 1) for part in (".qk", ".av")]
    assert set(found) == {"patch_embed.proj", "head", *attention, *products}
    assert set(found.values()) == {"no rule of the plan matches it"}


def test_every_product_of_an_unconverted_model_is_kept_for_that_reason(
    tiny_vit: nn.Module,
) -> None:
    found = cost(tiny_vit)
    kept = kept_in_float(tiny_vit, found)
    assert list(kept) == [site.name for site in found.sites]
    assert set(kept.values()) == {"the model is not converted"}


class OwnLinear(nn.Linear):
    """A layer of a derived type, which no handler converts."""


def test_layer_of_a_type_without_handler_is_listed_with_a_reason(tiny_vit: nn.Module) -> None:
    tiny_vit.head = OwnLinear(64, 10)
    converted(tiny_vit, "lsq")
    found = kept_in_float(tiny_vit, cost(tiny_vit))
    assert set(found) == {"patch_embed.proj", "head"}
    assert found["head"]


class Mix(nn.Module):
    """A product of unknown type."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(64, 64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)


@pytest.mark.parametrize("convert", [True, False])
def test_module_of_unknown_type_is_said_to_be_missing_from_the_counts(
    tiny_vit: nn.Module, convert: bool
) -> None:
    tiny_vit.fc_norm = Mix()
    if convert:
        converted(tiny_vit, "lsq")
    lines = coverage_lines(tiny_vit, cost(tiny_vit))
    assert (
        lines[-1]
        == "operations not counted: fc_norm.inner; the coverage is at most what is said here"
    )
    assert len(lines) == (3 if convert else 1)


def test_plan_table_has_a_row_for_every_product_with_its_costs(tiny_vit: nn.Module) -> None:
    found = cost(converted(tiny_vit, "lsq"))
    heading, *rows = rows_of(plan_table(found))
    assert heading == ["layer", "type", "precision", "MACs", "BOPs", "weight bytes"]
    assert [row[0] for row in rows] == [site.name for site in found.sites]
    # 16 patches of 4 pixels to 64; 17 tokens, 64 to 192, half a byte a weight and 192 scales; and
    # 17 x 17 x 64 in a product without weight.
    assert rows[0] == ["patch_embed.proj", "Conv2d", "float", "4,096", "4,194,304", "1,024"]
    assert rows[1] == [
        *("blocks.0.attn.qkv", "QuantLinear", "w4a4", "208,896", "3,342,336"),
        f"{64 * 192 // 2 + 4 * 192:,}",
    ]
    assert rows[3] == ["blocks.0.attn.qk", "product", "a4a4", "18,496", "295,936", "-"]


def test_costs_kept_with_metrics_are_those_of_the_formula(binary_deit: Cost) -> None:
    assert cost_items(binary_deit) == {
        "coverage_macs": 1 - 58_186_752 / 4_598_882_304,
        "size_bytes": binary_deit.size_bytes,
        "num_parameters": 22_050_664 + 46_092,  # and the state of the quantizers
        "macs": 4_598_882_304,
        "bops": 64_123_929_600,
        "ops": 129_135_120,
    }


def test_totals_of_binary_deit_small_are_beside_those_of_its_float_original(
    binary_deit: Cost, float_deit: Cost
) -> None:
    heading, *rows = rows_of(totals_table(binary_deit, float_deit))
    assert heading == ["", "this model", "float", "ratio"]
    # Bytes: 21,233,664 weights at one bit; 678,912 at 32, 41,472 weight scales, 46,092 numbers of
    # quantizers and 138,088 of biases, norms and positions. BOPs and OPs as in `test_cost`.
    size = 21_233_664 // 8 + 4 * (678_912 + 46_092 + 41_472 + 138_088)
    assert rows == [
        ["parameters", "22,096,756", "22,050,664", "1.00x"],
        ["bytes (weights at their bits, all else at 32)", f"{size:,}", "88,202,656", "14.06x"],
        ["MACs", "4,598,882,304", "4,598,882,304", "1.00x"],
        ["BOPs (MACs x bits x bits)", "64,123,929,600", "4,709,255,479,296", "73.44x"],
        ["OPs (FLOPs + BOPs/64, one FLOP a MAC)", "129,135,120", "4,598,882,304", "35.61x"],
    ]


def test_claim_on_binary_deit_small_says_how_many_conventions_give_it(binary_deit: Cost) -> None:
    lines = claim_lines("deit_small_patch16_224", binary_deit)
    verdicts = [line for line in lines if not line.startswith("    ")]
    source = "BinaryViT, arXiv 2305.14730, abstract"
    assert verdicts == [
        f"{source}: 16.2x smaller. 3 of 512 conventions give it, so it does not identify one:",
        f"{source}: 17.7x fewer OPs. none of 48 conventions gives it; the nearest:",
    ]
    ratios = [float(line.split("x")[0]) for line in lines if line not in verdicts]
    assert all(round(ratio, 1) == 16.2 for ratio in ratios[:3])
    assert ratios[3:] == [16.96, 18.52, 18.52]
    assert lines[4] == verdicts[1]


def test_claim_is_made_only_for_its_model_and_only_if_binary(
    binary_deit: Cost, float_deit: Cost
) -> None:
    model = qat.timm_model("deit_small_patch16_224")
    qat.convert_(model, plan(4), LSQ)
    assert claim_lines("deit_small_patch16_224", cost(model)) == []
    assert claim_lines("deit_small_patch16_224", float_deit) == []
    assert claim_lines("deit_tiny_patch16_224", binary_deit) == []

"""From a sensitivity table to a plan: options, costs, constants, reasons, latency tables."""

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

import qat
from binaryvit import BinaryQuantizers
from binaryvit.convert import react_
from qat import Operand, Plan
from qat.cost.count import Cost, cost
from qat.cost.latency import LatencyTable
from qat.quantizers import LSQ, quantizers
from qat.quantizers.slots import Slot
from qat.search import pmq
from qat.search.allocate import best, frontier, totals
from tests.conftest import make_tiny_vit
from tests.qat.common import plan

SPACE = pmq.Space()
BOPS = pmq.cost_of("bops", None)


def template() -> nn.Module:
    """The tiny ViT, its blocks at eight bits; patch embedding and head stay in float."""
    model = make_tiny_vit()
    qat.convert_(model, plan(8), LSQ)
    return model


def even_table(model: nn.Module, space: pmq.Space = SPACE) -> dict[Slot, dict[int, float]]:
    """Every operand as sensitive as any other."""
    return {
        slot: {bits: 4.0**-bits for bits in widths}
        for slot, widths in pmq.slots(model, space).items()
    }


def found_plan(model: nn.Module, budget: float, space: pmq.Space = SPACE) -> tuple[Plan, float]:
    """The plan for a budget in BOPs, and what it is predicted to cost."""
    table = even_table(model, space)
    task = pmq.problem(cost(model), table, space, "bops", BOPS)
    picks = best(task.components, budget - task.constant)
    reasons = pmq.reasons(task.components, picks, cost(model), "bops")
    chosen = pmq.chosen_bits(task.components, picks, table)
    spent, _ = totals(task.components, picks)
    return pmq.plan_of(model, chosen, reasons), spent + task.constant


@pytest.mark.parametrize("measure", ["bops", "size_bytes"])
def test_predicted_cost_of_a_uniform_choice_is_what_the_plan_costs(measure: pmq.Measure) -> None:
    model = template()
    price = pmq.cost_of(measure, None)
    task = pmq.problem(cost(model), even_table(model), SPACE, measure, price)
    other = make_tiny_vit()
    qat.convert_(other, plan(2), LSQ)
    cheapest = sum(c.options[0].cost for c in task.components) + task.constant
    assert cheapest == pmq.cost_under(measure, price, other)
    expected = cost(other).bops if measure == "bops" else cost(other).size_bytes
    assert cheapest == expected


def test_plan_costs_what_was_predicted_and_no_more_than_the_budget(tmp_path: Path) -> None:
    model = template()
    budget = 0.4 * cost(model).bops
    found, predicted = found_plan(model, budget)
    found.save(tmp_path / "plan.yaml")
    other = make_tiny_vit()
    qat.convert_(other, Plan.load(tmp_path / "plan.yaml"), LSQ)
    assert cost(other).bops == predicted <= budget
    assert predicted > 0.98 * budget


def test_every_rule_names_one_module_says_why_and_keeps_what_the_template_keeps() -> None:
    model = template()
    found, _ = found_plan(model, 0.3 * cost(model).bops)
    rules = {rule.pattern: rule for rule in found}
    assert set(rules) == {name for name, m in make_tiny_vit().named_modules() if name in rules}
    assert rules["head"].operands == rules["patch_embed.proj"].operands == frozenset()
    assert "no rule of the plan matches it" in rules["head"].reason
    attention = rules["blocks.0.attn"]
    assert attention.operands == {Operand.QUERY, Operand.KEY, Operand.ATTENTION, Operand.VALUE}
    assert "blocks.0.attn.qk" in attention.reason and "blocks.0.attn.av" in attention.reason
    fc1 = rules["blocks.1.mlp.fc1"]
    assert fc1.weight is not None and fc1.input is not None
    precision = f"w{fc1.weight.bits}a{fc1.input.bits}"
    assert f"blocks.1.mlp.fc1 {precision}: " in fc1.reason and "of the loss for" in fc1.reason
    assert attention.attention is not None and not attention.attention.signed
    weight = rules["blocks.1.mlp.fc1"].weight
    assert weight is not None and weight.granularity == "per_channel"


def test_sensitive_operand_gets_more_bits_than_its_twin() -> None:
    model = template()
    table = even_table(model)
    slot = Slot("blocks.1.mlp.fc1", Operand.INPUT)
    table[slot] = {bits: 1e3 * value for bits, value in table[slot].items()}
    task = pmq.problem(cost(model), table, SPACE, "bops", BOPS)
    budget = 0.25 * cost(model).bops - task.constant
    chosen = pmq.chosen_bits(task.components, best(task.components, budget), table)
    assert chosen[slot] > chosen[Slot("blocks.0.mlp.fc1", Operand.INPUT)]


def test_one_bit_goes_with_one_bit_only() -> None:
    space = pmq.Space((1, 2, 8), (1, 2, 8))
    model = template()
    task = pmq.problem(cost(model), even_table(model, space), space, "bops", BOPS)
    pairs = {option.bits for c in task.components for option in c.options}
    assert (1, 1) in pairs and (2, 8) in pairs
    assert not {(1, 2), (2, 1), (1, 8), (8, 1)} & pairs


def test_equal_pairs_are_equal_in_every_product() -> None:
    space = replace(SPACE, pairs="equal")
    model = template()
    task = pmq.problem(cost(model), even_table(model), space, "bops", BOPS)
    assert {o.bits for c in task.components for o in c.options} == {(b, b) for b in range(2, 9)}


def test_product_with_one_operand_in_float_has_options_for_the_other() -> None:
    model = make_tiny_vit()
    rules = [{"pattern": "blocks.*.mlp.*", "weight": {"bits": 8}}]
    qat.convert_(model, Plan.from_list(rules), LSQ)
    task = pmq.problem(cost(model), even_table(model), SPACE, "bops", BOPS)
    assert {o.bits[0] for c in task.components for o in c.options} == {32}
    assert len(task.components) == 4


def test_plan_with_binary_blocks_loads_and_converts_through_react() -> None:
    space = pmq.Space((1, 4), (1, 4), "equal")
    model = make_tiny_vit()
    qat.convert_(model, plan(4), BinaryQuantizers())
    full, constant = cost(model).bops, make_tiny_vit()
    found, predicted = found_plan(model, 0.6 * full, space)
    react_(constant, found, BinaryQuantizers())
    assert cost(constant).bops == predicted
    bits = {q.spec.bits for _, q in quantizers(constant)}
    assert bits == {1, 4}
    kinds = {type(m).__name__ for n, m in constant.named_modules() if n.endswith("mlp.fc1")}
    kinds |= {type(m).__name__ for n, m in constant.named_modules() if n.endswith("attn.qkv")}
    assert "ReactLinear" in kinds or "QuantLinear" in kinds
    for name, module in constant.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None:
            react = type(module).__name__ == "ReactLinear"
            assert react == (quantizer.spec.bits == 1), name


def test_reach_is_what_the_narrowest_and_the_widest_plan_cost() -> None:
    model = template()
    found = pmq.reach(cost(model), pmq.slots(model, SPACE), SPACE, "bops", BOPS)
    narrow = make_tiny_vit()
    qat.convert_(narrow, plan(2), LSQ)
    assert found == (cost(narrow).bops, cost(model).bops)


def test_mean_bits_are_weighted_by_elements_and_by_macs() -> None:
    model = template()
    sites = {site.name: site for site in cost(model).sites}
    chosen = tuple(replace(sites[n], bits=b) for n, b in (("blocks.0.mlp.fc1", (4, 2)),
                                                         ("blocks.0.attn.proj", (8, 6)),
                                                         ("blocks.0.attn.qk", (3, 5))))  # fmt: skip
    found = pmq.mean_bits(Cost(chosen, {}, ()))
    fc1, proj, qk = 64 * 256, 64 * 64, 17 * 17 * 64
    weights = (2 * fc1 + 6 * proj) / (fc1 + proj)
    read = (4 * 17 * fc1 + 8 * 17 * proj + 8 * qk) / (17 * fc1 + 17 * proj + 2 * qk)
    assert found == pytest.approx((weights, read))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": ()}, r"search.weights needs widths from 1 to 8, got \[\]"),
        ({"activations": (4, 9)}, r"search.activations needs widths from 1 to 8, got \[4, 9\]"),
    ],
)
def test_impossible_space_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pmq.Space(**arguments)  # type: ignore[arg-type]


def test_component_without_a_legal_pair_is_refused_by_name() -> None:
    space = pmq.Space((2, 3), (4, 5), "equal")
    model = template()
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv: no pair of widths is allowed"):
        pmq.problem(cost(model), even_table(model, space), space, "bops", BOPS)


def test_float_model_has_nothing_to_search() -> None:
    with pytest.raises(ValueError, match="nothing to search"):
        pmq.slots(make_tiny_vit(), SPACE)


def test_latency_table_prices_products_by_the_first_row_that_matches(tmp_path: Path) -> None:
    path = tmp_path / "latency.csv"
    rows = "blocks.0.attn.qkv,8,8,1.5e-3\n*.qkv,8,8,2e-3\n*,8,4,1e-3\n"
    path.write_text("site,left_bits,right_bits,seconds\n" + rows)
    table = LatencyTable.load(path)
    assert table.seconds("blocks.0.attn.qkv", (8, 8)) == 1.5e-3
    assert table.seconds("blocks.1.attn.qkv", (8, 8)) == 2e-3
    assert table.seconds("head", (8, 4)) == 1e-3
    with pytest.raises(ValueError, match="no row for head at 4 x 8 bits"):
        table.seconds("head", (4, 8))


def test_budget_in_seconds_follows_the_table(tmp_path: Path) -> None:
    path = tmp_path / "latency.csv"
    lines = [f"*,{a},{b},{a + 10 * b}e-6" for a in (2, 8, 32) for b in (2, 8, 32)]
    path.write_text("site,left_bits,right_bits,seconds\n" + "\n".join(lines))
    space = pmq.Space((2, 8), (2, 8))
    model = template()
    price = pmq.cost_of("seconds", LatencyTable.load(path))
    task = pmq.problem(cost(model), even_table(model, space), space, "seconds", price)
    assert task.constant == pytest.approx(2 * (32 + 320) * 1e-6)
    found = frontier(task.components)
    assert found.costs[0] == pytest.approx(12 * 22e-6)
    assert found.costs[-1] == pytest.approx(12 * 88e-6)
    # A bit of the left operand is ten times cheaper than one of the right.
    first = task.components[0].options[max(found.picks(1))]
    assert first.bits == (8, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no latency table .*; measure one with benchmarks/latency_table.py"),
        ("site,bits\nhead,8\n", "needs the columns site, left_bits, right_bits, seconds"),
        ("site,left_bits,right_bits,seconds\nhead,8,8,fast\n", "needs the columns .*fast"),
    ],
)
def test_broken_latency_table_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "latency.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        LatencyTable.load(path)


def test_seconds_without_a_table_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs search.latency_table"):
        pmq.cost_of("seconds", None)

"""Plans: what matches, what survives a file, and what is refused by which message."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat import Granularity, Operand, Plan, QuantSpec, Rule
from qat.plan import OPERANDS, load_plan
from tests.strategies import specs

LAYER = frozenset({Operand.WEIGHT, Operand.INPUT})
ATTENTION = frozenset(Operand) - LAYER
NAMES = {
    "blocks.0.attn": ATTENTION,
    "blocks.0.attn.qkv": LAYER,
    "blocks.1.attn": ATTENTION,
    "blocks.1.attn.qkv": LAYER,
    "head": LAYER,
}


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    given_to = draw(st.dictionaries(st.sampled_from(OPERANDS), specs()))
    return Rule(
        draw(st.sampled_from(["*", "blocks.*", "head"])), **given_to, reason=draw(st.text())
    )


def test_first_rule_that_matches_wins() -> None:
    special, general = Rule("blocks.1.*", reason="special"), Rule("blocks.*", reason="general")
    plan = Plan((special, general))
    assert plan.match("blocks.1.mlp.fc1") is special
    assert plan.match("blocks.0.mlp.fc1") is general
    assert plan.match("head") is None


def test_star_matches_dots_and_case_counts() -> None:
    plan = Plan((Rule("blocks.*.attn"),))
    assert plan.match("blocks.0.deep.attn") is not None
    assert plan.match("Blocks.0.attn") is None


@given(st.lists(rules(), min_size=1, max_size=4))
def test_plan_survives_plain_data(items: list[Rule]) -> None:
    plan = Plan(tuple(items))
    assert Plan.from_list(plan.to_list()) == plan


def test_plan_survives_a_file(tmp_path: Path) -> None:
    weight = QuantSpec(3, granularity=Granularity.PER_CHANNEL)
    plan = Plan((Rule("blocks.*", weight=weight), Rule("head", reason="stays: in float")))
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan


def test_plain_data_leaves_defaults_out() -> None:
    rule = Rule("head", weight=QuantSpec(4), input=QuantSpec(8, signed=False))
    assert Plan((rule,)).to_list() == [
        {"pattern": "head", "weight": {"bits": 4}, "input": {"bits": 8, "signed": False}}
    ]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "the plan has no rules"),
        ({"pattern": "head"}, "a plan is a list of rules, got dict"),
        (["head"], "a rule is a mapping with a pattern, got 'head'"),
        ([{"weight": {"bits": 4}}], "needs a 'pattern', a string"),
        ([{"pattern": 3}], "needs a 'pattern', a string"),
        ([{"pattern": "*", "wieght": {"bits": 4}}], "unknown key 'wieght'.*did you mean 'weight'"),
        ([{"pattern": "*", "zzz": 1}], "unknown key 'zzz'.*expected one of attention, input"),
        ([{"pattern": "*", "weight": 4}], "weight needs a spec such as {bits: 4}, got 4"),
        ([{"pattern": "*", "weight": None}], "weight needs a spec such as {bits: 4}, got None"),
        ([{"pattern": "*", "weight": {}}], "weight needs a spec"),
        ([{"pattern": "*", "weight": {"bits": "4"}}], "weight needs a spec"),
        ([{"pattern": "*", "weight": {"bits": 4.0}}], "weight needs a spec"),
        ([{"pattern": "*", "weight": {"bits": True}}], "weight needs a spec"),
        ([{"pattern": "*", "weight": {"bits": 99}}], "bits must be 1 to 16, got 99"),
        ([{"pattern": "*", "key": {"bits": 4, "sign": True}}], "'sign' in key; .*mean 'signed'"),
        ([{"pattern": "*", "input": {"bits": 4, "signed": 1}}], "input.signed must be true or"),
        (
            [{"pattern": "*", "input": {"bits": 4, "granularity": "per_chanel"}}],
            "input.granularity 'per_chanel'; did you mean 'per_channel'",
        ),
        (
            [{"pattern": "*", "input": {"bits": 4, "granularity": "PER_TENSOR"}}],
            "expected one of per_channel, per_tensor",
        ),
        ([{"pattern": "*", "input": {"bits": 4, "granularity": 1}}], "input.granularity '1'"),
    ],
)
def test_wrong_plan_is_refused_by_a_message_that_names_it(items: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_list(items)


def test_missing_plan_file_says_where_ready_ones_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no plan file '.*nowhere.yaml'.*configs/plans"):
        Plan.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["- {pattern: [", "- {pattern: head, weight: {bits: 77}}", "3"])
def test_broken_plan_file_is_named_by_the_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"plan file '.*broken\.yaml'(: | is no YAML)"):
        Plan.load(path)


def test_rule_that_matches_nothing_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(ValueError, match=r"'block\.\*\.attn' matches no.*blocks\.0\.attn"):
        Plan((Rule("blocks.*"), Rule("block.*.attn"))).check_applied(NAMES)


def test_shadowed_rule_is_refused_with_the_rule_that_shadows_it() -> None:
    with pytest.raises(ValueError, match=r"'blocks\.1\.\*' has no effect.*'blocks\.\*'.*first"):
        Plan((Rule("blocks.*"), Rule("blocks.1.*"))).check_applied(NAMES)


def test_spec_for_an_operand_that_no_module_has_is_refused() -> None:
    rule = Rule("*.qkv", weight=QuantSpec(4), query=QuantSpec(4))
    with pytest.raises(ValueError, match=r"spec to query, which none.*blocks\.0\.attn\.qkv"):
        Plan((rule,)).check_applied(NAMES)


def test_spec_is_accepted_if_one_of_the_matched_modules_has_the_operand() -> None:
    Plan((Rule("*", weight=QuantSpec(4), query=QuantSpec(4)),)).check_applied(NAMES)


def test_short_name_of_a_plan_is_the_uniform_plan_with_the_image_on_eight_bits() -> None:
    plan = load_plan("w2a4")
    assert plan == Plan.uniform(2, 4)
    image, others = plan
    weight = QuantSpec(2, False, Granularity.PER_CHANNEL)
    low = QuantSpec(4, False)
    assert (image.pattern, others.pattern) == ("patch_embed.proj", "*")
    assert (image.weight, image.input) == (weight, QuantSpec(8, False))
    assert image.operands == {Operand.WEIGHT, Operand.INPUT}
    assert [others.spec(operand) for operand in Operand] == [weight, *[low] * 7]
    assert image.optional and others.optional


def test_short_name_of_an_impossible_width_is_refused_as_such() -> None:
    with pytest.raises(ValueError, match="bits must be 1 to 16, got 99"):
        load_plan("w99a4")


def test_uniform_plan_without_zero_points_is_signed_but_for_attention_maps() -> None:
    """`w4a4` serves quantizers of both kinds, such as Affine and LSQ."""
    (image, rule) = load_plan("w4a4", zero_point=False).rules
    assert image.input == QuantSpec(8) and image.weight == rule.weight
    assert rule.attention == QuantSpec(4, signed=False)
    others = (rule.input, rule.query, rule.key, rule.value, rule.left, rule.right)
    assert set(others) == {QuantSpec(4)}

"""Bit-width plans: name patterns, and the specs they give to the operands of what they match.

A plan is data, a YAML list of rules; `search` writes one, everything else reads it.

    - {pattern: "blocks.*.attn", query: {bits: 4}, key: {bits: 4}, value: {bits: 4},
       attention: {bits: 4, signed: false}}
    - {pattern: "blocks.*", weight: {bits: 4, granularity: per_channel}, input: {bits: 4}}
    - {pattern: head, reason: the classifier stays in float}

The first rule whose pattern matches a module's name applies to it; a rule without specs keeps what
it matches in float, for the reason it states. A rule without effect is an error, unless it says
`optional: true`. Patterns are those of `fnmatch`: `*` also matches dots.

Products of activations belong to the module that runs them: `query`, `key`, `attention` and `value`
where a softmax stands between two, `left` and `right` elsewhere. Where a module has several, the
second is called `module#1`, the third `module#2`; a rule for the module holds for all of them.
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from qat import disk
from qat.documents import read_yaml
from qat.spec import Granularity, Operand, QuantSpec

OPERANDS = tuple(operand.value for operand in Operand)


@dataclass(frozen=True)
class Rule:
    """One name pattern and the specs of the operands of the modules it matches.

    Attributes:
        pattern: `fnmatch` pattern over module names, such as `blocks.*.attn`.
        weight: Spec of the weight of linear and convolution layers; None keeps it in float.
        input: Spec of their input.
        query: Spec of the left operand of Q K^T.
        key: Spec of the right operand of Q K^T.
        attention: Spec of the softmax output, the left operand of A V.
        value: Spec of the right operand of A V.
        reason: Why the rule says what it says; shown beside what it keeps in float.
        left: Spec of the left operand of products of activations outside of an attention.
        right: Spec of their right operand.
        optional: The rule, or some of its specs, may have no effect.
    """

    pattern: str
    weight: QuantSpec | None = None
    input: QuantSpec | None = None
    query: QuantSpec | None = None
    key: QuantSpec | None = None
    attention: QuantSpec | None = None
    value: QuantSpec | None = None
    reason: str = ""
    left: QuantSpec | None = None
    right: QuantSpec | None = None
    optional: bool = False

    def spec(self, operand: Operand) -> QuantSpec | None:
        """The spec this rule gives to an operand."""
        return getattr(self, operand.value)

    @property
    def operands(self) -> frozenset[Operand]:
        """The operands this rule quantizes."""
        return frozenset(operand for operand in Operand if self.spec(operand) is not None)


@dataclass(frozen=True)
class Plan:
    """An ordered list of rules.

    Raises:
        ValueError: If there are no rules.
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError("the plan has no rules; it needs at least one, see configs/plans/")

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def match(self, name: str) -> Rule | None:
        """The first rule whose pattern matches `name`, or `name` without its `#` and number."""
        found = next((r for r in self.rules if fnmatch.fnmatchcase(name, r.pattern)), None)
        return self.match(name.partition("#")[0]) if found is None and "#" in name else found

    def check_applied(self, applied: dict[str, frozenset[Operand]]) -> None:
        """Refuse rules, and specs of rules, that have no effect.

        Args:
            applied: For each layer and product, by plan name, the operands it has.

        Raises:
            ValueError: If a rule that is not optional applies to nothing, or gives a spec to an
                operand that nothing it applies to has.
        """
        ruling = {name: self.match(name) for name in applied}
        for rule in self.rules:
            if rule.optional:
                continue
            names = [name for name, found in ruling.items() if found is rule]
            if not names:
                raise ValueError(self._unused(rule, list(applied)))
            present = frozenset[Operand]().union(*(applied[name] for name in names))
            if idle := rule.operands - present:
                raise ValueError(
                    f"plan rule '{rule.pattern}' gives a spec to {_words(idle)}, which none of the "
                    f"modules it applies to has ({_words(names[:3])}, ...); they have "
                    f"{_words(present)}"
                )

    def _unused(self, rule: Rule, names: list[str]) -> str:
        taken = [name for name in names if fnmatch.fnmatchcase(name, rule.pattern)]
        if taken:
            earlier = self.match(taken[0])
            assert earlier is not None
            return (
                f"plan rule '{rule.pattern}' has no effect: everything it matches is taken by the "
                f"earlier rule '{earlier.pattern}'; put the more specific rule first"
            )
        near = difflib.get_close_matches(rule.pattern.replace("*", "0"), names, n=3, cutoff=0.3)
        return (
            f"plan rule '{rule.pattern}' matches no quantizable layer; nearest names: "
            f"{_words(near or names[:3])}; write `optional: true` where it need not match"
        )

    @staticmethod
    def from_list(items: object) -> "Plan":
        """Build a plan from plain lists and dictionaries, as YAML gives them.

        Raises:
            ValueError: If a key is unknown, a value has the wrong type or a spec is impossible.
        """
        if not isinstance(items, list):
            raise ValueError(f"a plan is a list of rules, got {type(items).__name__}")
        return Plan(tuple(_rule(item) for item in items))

    def to_list(self) -> list[dict[str, Any]]:
        """The plan as plain lists and dictionaries, defaults left out."""
        return [
            {"pattern": rule.pattern}
            | ({"optional": True} if rule.optional else {})
            | {name: _spec_items(spec) for name in OPERANDS if (spec := getattr(rule, name))}
            | ({"reason": rule.reason} if rule.reason else {})
            for rule in self.rules
        ]

    @staticmethod
    def uniform(weight: int, activation: int, zero_point: bool = True) -> "Plan":
        """Every product at one width of weights and one of activations, the image on 8 bits.

        Weights have a scale for each output channel. It applies to any model; one without a
        `patch_embed.proj` has no rule of its own for the image.

        Args:
            weight: Bits of weights.
            activation: Bits of activations, the image apart.
            zero_point: True for grids with a zero point, False for grids symmetric around zero;
                attention maps, which are never negative, are unsigned in both.

        Raises:
            ValueError: If a width is impossible.
        """
        signed = not zero_point
        weights = QuantSpec(weight, signed, Granularity.PER_CHANNEL)
        image, low, maps = (
            QuantSpec(8, signed),
            QuantSpec(activation, signed),
            QuantSpec(activation, False),
        )
        return Plan(
            (
                Rule("patch_embed.proj", weights, image, optional=True),
                Rule("*", weights, low, low, low, maps, low, left=low, right=low, optional=True),
            )
        )

    @staticmethod
    def load(path: str | Path) -> "Plan":
        """Read a plan file.

        Raises:
            ValueError: If the file is missing, is no YAML or is no plan.
        """
        try:
            items = read_yaml(Path(path), "plan file")
        except FileNotFoundError:
            raise ValueError(
                f"no plan file '{path}'; w4a4 is the uniform plan, others are in configs/plans/"
            ) from None
        try:
            return Plan.from_list(items)
        except ValueError as error:
            raise ValueError(f"plan file '{path}': {error}") from None

    def save(self, path: str | Path) -> None:
        """Write a plan file."""
        disk.write(path, yaml.safe_dump(self.to_list(), sort_keys=False))


def load_plan(plan: str | list[dict[str, Any]], zero_point: bool = True) -> Plan:
    """A plan from what a recipe says: a file, the rules, or `w4a4` for the uniform plan.

    The uniform plan has grids with a zero point, where the quantizers offer one.
    """
    if not isinstance(plan, str):
        return Plan.from_list(plan)
    if widths := re.fullmatch(r"w(\d+)a(\d+)", plan):
        return Plan.uniform(int(widths[1]), int(widths[2]), zero_point)
    return Plan.load(plan)


def nearest(word: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelt word: `; did you mean 'x'?`, or the known words."""
    known = list(known)
    if near := difflib.get_close_matches(word, known, n=1):
        return f"; did you mean '{near[0]}'?"
    return f"; expected one of {_words(known)}"


def _words(items: Iterable[object]) -> str:
    return ", ".join(sorted(str(item) for item in items))


def _rule(item: object) -> Rule:
    known = [field.name for field in fields(Rule)]
    if not isinstance(item, dict):
        raise ValueError(f"a rule is a mapping with a pattern, got {item!r}")
    for key in item:
        if key not in known:
            raise ValueError(f"unknown key '{key}' in rule {item}" + nearest(str(key), known))
    if not isinstance(item.get("pattern"), str):
        raise ValueError(f"rule {item} needs a 'pattern', a string such as 'blocks.*'")
    specs = {name: _spec(name, item[name]) for name in OPERANDS if name in item}
    optional = item.get("optional", False)
    if not isinstance(optional, bool):
        raise ValueError(f"optional must be true or false in rule {item}, got {optional!r}")
    return Rule(item["pattern"], **specs, reason=str(item.get("reason", "")), optional=optional)


def _spec(operand: str, item: object) -> QuantSpec:
    known = [field.name for field in fields(QuantSpec)]
    if not isinstance(item, dict) or type(item.get("bits")) is not int:
        raise ValueError(f"{operand} needs a spec such as {{bits: 4}}, got {item!r}")
    for key in item:
        if key not in known:
            raise ValueError(f"unknown key '{key}' in {operand}" + nearest(str(key), known))
    granularity = item.get("granularity", Granularity.PER_TENSOR.value)
    if granularity not in list(Granularity):
        raise ValueError(
            f"{operand}.granularity '{granularity}'" + nearest(str(granularity), Granularity)
        )
    if not isinstance(item.get("signed", True), bool):
        raise ValueError(f"{operand}.signed must be true or false, got {item['signed']!r}")
    return QuantSpec(**{**item, "granularity": Granularity(granularity)})


def _spec_items(spec: QuantSpec) -> dict[str, Any]:
    default = asdict(QuantSpec(bits=spec.bits))
    return {
        key: value.value if isinstance(value, Granularity) else value
        for key, value in asdict(spec).items()
        if key == "bits" or value != default[key]
    }

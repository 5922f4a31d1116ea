"""PMQ: mixed precision from a sensitivity table, by the Pareto frontier, under a budget.

Xiao, Li, Yang, Gu. PMQ: Patch-wise Mixed-Precision Quantization of Vision Transformer.
https://arxiv.org/abs/2305.06559

The recipe's own plan is the template: what it leaves in float stays there, and the operands that it
quantizes keep sign and granularity. Its initialiser runs first, so that a reparametrization of the
weights is part of what is measured. Then

    components   every linear layer and both products of every attention
    options      pairs of allowed widths of the two operands
    loss         Omega of the one operand plus Omega of the other
    cost         BOPs, bytes or measured seconds; all that is not chosen is a constant

and the best point of the frontier within the budget becomes the plan, or the knee without a budget.

Provenance: the abstract is certain about a global metric, a Pareto frontier and patch-wise bits;
the rest is a *reconstruction*. The patch-wise part is `qat.patchwise`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from torch import nn

from qat.card import conversion_of
from qat.cost.count import Cost, Site, Width, cost
from qat.cost.latency import LatencyTable
from qat.plan import Plan, Rule
from qat.quantizers import quantizers
from qat.quantizers.slots import PRODUCTS, Slot, slot_of, slots_of
from qat.search.allocate import Component, Frontier, Option, Picks, totals
from qat.search.sensitivity import Table
from qat.spec import Operand

Measure = Literal["bops", "size_bytes", "seconds"]
BINARY = 1


@dataclass(frozen=True)
class Space:
    """What the search may choose.

    Attributes:
        weights: Allowed widths of weights.
        activations: Allowed widths of activations.
        pairs: `any` pair of widths in a product, or only `equal` ones, as some hardware needs.
            One bit goes with one bit only, because products of bits need both operands binary.

    Raises:
        ValueError: If a width is not 1 to 8, or there is none.
    """

    weights: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    activations: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    pairs: Literal["any", "equal"] = "any"

    def __post_init__(self) -> None:
        for name in ("weights", "activations"):
            widths = getattr(self, name)
            if not widths or not all(1 <= bits <= 8 for bits in widths):
                raise ValueError(f"search.{name} needs widths from 1 to 8, got {list(widths)}")

    def widths(self, operand: Operand) -> tuple[int, ...]:
        """Allowed widths of an operand, narrowest first."""
        return tuple(sorted(set(self.weights if operand is Operand.WEIGHT else self.activations)))

    def allows(self, left: Width, right: Width) -> bool:
        """Whether the two operands of a product may have these widths."""
        if left == right:
            return True
        return self.pairs == "any" and BINARY not in (left, right)


def slots(model: nn.Module, space: Space) -> dict[Slot, tuple[int, ...]]:
    """Every operand that the template quantizes, with the widths to measure it at."""
    found = {slot_of(path, q): space.widths(q.operand) for path, q in quantizers(model)}
    if not found:
        raise ValueError(
            "nothing to search: the recipe's plan quantizes nothing; set model.plan to a plan "
            "whose operands the search may narrow, such as w8a8"
        )
    return found


SiteCost = Callable[[Site], float]


def cost_of(measure: Measure, latency: LatencyTable | None) -> SiteCost:
    """What a product costs at its bits, in units of the budget.

    Raises:
        ValueError: If seconds are asked for without a table.
    """
    if measure == "bops":
        return lambda site: float(site.bops)
    if measure == "size_bytes":
        return lambda site: site.num_weights * site.bits[1] / 8
    if latency is None:
        raise ValueError(
            "a budget in seconds needs search.latency_table, a file that "
            "benchmarks/latency_table.py measures"
        )
    return lambda site: latency.seconds(site.name, site.bits)


@dataclass(frozen=True)
class Problem:
    """Components to choose for, and what the rest of the model costs.

    Attributes:
        components: In the order of the model.
        constant: Cost of all that is not chosen.
    """

    components: tuple[Component, ...]
    constant: float


def problem(costs: Cost, table: Table, space: Space, measure: Measure, price: SiteCost) -> Problem:
    """Components of a model with the cost and the loss of every option.

    A product of which one operand stays in float has options for the other.

    Args:
        costs: Of the model under the template plan.
        table: Omega of every slot, non-increasing in the width.
        space: Allowed widths.
        measure: Unit of the budget.
        price: From `cost_of`.

    Raises:
        ValueError: If a component has no option.
    """
    components, constant = [], 0.0
    for site in costs.sites:
        rows = [table.get(slot) for slot in slots_of(site.name)]
        if not any(rows):
            constant += price(site)
            continue
        options = []
        lefts, rights = (_losses(row, bits) for row, bits in zip(rows, site.bits, strict=True))
        for bits in product(lefts, rights):
            if all(rows) and not space.allows(*bits):
                continue
            loss = lefts[bits[0]] + rights[bits[1]]
            options.append(Option(bits, price(replace(site, bits=bits)), loss))
        if not options:
            raise ValueError(
                f"{site.name}: no pair of widths is allowed; search.weights and "
                "search.activations need a width in common for search.pairs 'equal', and 1 in both "
                "or in neither"
            )
        components.append(Component.of(site.name, options))
    if measure == "size_bytes":
        chosen = sum(price(s) for s in costs.sites if any(table.get(t) for t in slots_of(s.name)))
        constant = costs.size_bytes - chosen
    return Problem(tuple(components), constant)


def plan_of(template: nn.Module, chosen: Mapping[Slot, int], reasons: Mapping[str, str]) -> Plan:
    """A plan with a rule for each module, by name.

    Args:
        template: The converted model; says signs and granularities, and what stays in float.
        chosen: The width of each slot.
        reasons: Why, for each product.
    """
    conversion = conversion_of(template)
    owners = dict.fromkeys(slot.module for slot in chosen)
    rules = []
    for owner in owners:
        rule = conversion.plan.match(owner) or Rule(owner)
        specs = {
            slot.operand.value: replace(spec, bits=bits)
            for slot, bits in chosen.items()
            if slot.module == owner and (spec := rule.spec(slot.operand))
        }
        names = (owner, *(f"{owner}.{product}" for product in PRODUCTS))
        words = [reasons[name] for name in names if name in reasons]
        rules.append(Rule(owner, reason="; ".join(words), **specs))  # type: ignore[arg-type]
    kept = conversion.kept.items()
    return Plan((*rules, *(Rule(name, reason=reason) for name, reason in kept)))


def chosen_bits(components: tuple[Component, ...], picks: Picks, table: Table) -> dict[Slot, int]:
    """The width of each slot of the table."""
    found = {}
    for component, pick in zip(components, picks, strict=True):
        pair = zip(slots_of(component.name), component.options[pick].bits, strict=True)
        found |= {slot: int(bits) for slot, bits in pair if slot in table}
    return found


def reasons(
    components: tuple[Component, ...], picks: Picks, costs: Cost, measure: Measure
) -> dict[str, str]:
    """Why each product got its bits: its share of loss and cost, and what the next step gives."""
    total_cost, total_loss = totals(components, picks)
    sites = {site.name: site for site in costs.sites}
    found = {}
    for component, pick in zip(components, picks, strict=True):
        site, option = sites[component.name], component.options[pick]

        def named(other: Option, site: Site = site) -> str:
            return replace(site, bits=other.bits).precision

        text = (
            f"{component.name} {named(option)}: {_share(option.loss, total_loss)} of the loss for "
            f"{_share(option.cost, total_cost)} of the {measure}"
        )
        if pick + 1 < len(component.options):
            wider = component.options[pick + 1]
            text += (
                f", {named(wider)} would save {_share(option.loss - wider.loss, total_loss)} for "
                f"{_share(wider.cost - option.cost, total_cost)} more"
            )
        if pick:
            narrower = component.options[pick - 1]
            text += (
                f", {named(narrower)} would add {_share(narrower.loss - option.loss, total_loss)} "
                f"for {_share(option.cost - narrower.cost, total_cost)} less"
            )
        found[component.name] = text
    return found


def mean_bits(costs: Cost) -> tuple[float, float]:
    """Mean width of weights, by element, and of activations, by the MACs that read them."""
    weights = [(site.num_weights, site.bits[1]) for site in costs.sites if site.num_weights]
    read = [(site.macs, site.bits[0]) for site in costs.sites]
    read += [(site.macs, site.bits[1]) for site in costs.sites if not site.num_weights]
    return tuple(  # type: ignore[return-value]
        sum(n * bits for n, bits in group) / sum(n for n, _ in group) for group in (weights, read)
    )


def reach(
    costs: Cost,
    widths: Mapping[Slot, tuple[int, ...]],
    space: Space,
    measure: Measure,
    price: SiteCost,
) -> tuple[float, float]:
    """Least and most that a plan of the space costs, before anything is measured."""
    table = {slot: {bits: -float(bits) for bits in row} for slot, row in widths.items()}
    found = problem(costs, table, space, measure, price)
    ends = ((c.options[0].cost, c.options[-1].cost) for c in found.components)
    least, most = map(sum, zip(*ends, strict=True))
    return found.constant + least, found.constant + most


def frontier_rows(found: Frontier, constant: float, measure: Measure) -> list[dict[str, float]]:
    """The frontier as rows of a table: totals of the model, and the loss."""
    points = zip(found.costs, found.losses, strict=True)
    return [{measure: float(cost + constant), "loss": float(loss)} for cost, loss in points]


def cost_under(measure: Measure, price: SiteCost, model: nn.Module) -> float:
    """What a converted model costs, in units of the budget."""
    costs = cost(model)
    return costs.size_bytes if measure == "size_bytes" else sum(map(price, costs.sites))


def _losses(row: Mapping[int, float] | None, bits: Width) -> dict[Width, float]:
    """The loss of an operand at its widths; one in float has that width only, and no loss."""
    return {bits: 0.0} if row is None else {width: loss for width, loss in row.items()}


def _share(value: float, total: float) -> str:
    return f"{value / total:.2%}" if total else "0 %"

"""Tables of a model: what is quantized, what is not and why, bytes and operations."""

from collections import defaultdict
from typing import Any

from rich.table import Table
from torch import nn

from qat.card import Card
from qat.cost.conventions import CLAIMS, Count, matches, ops_counts, plain_ops, size_counts
from qat.cost.count import TRANSFORM, Cost, Site


def coverage_rows(cost: Cost) -> list[dict[str, Any]]:
    """Shares of MACs and of weights at every precision, the most MACs first."""
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in cost.sites:
        groups[site.precision].append(site)
    num_weights = sum(site.num_weights for site in cost.sites)
    return [
        {
            "precision": precision,
            "macs": sum(site.macs for site in sites) / cost.macs,
            "weights": sum(site.num_weights for site in sites) / num_weights,
            "where": f"{len(sites)} products, such as {sites[0].name}",
        }
        for precision, sites in sorted(groups.items(), key=lambda x: -sum(s.macs for s in x[1]))
    ]


def coverage_table(cost: Cost) -> Table:
    """The same, to print."""
    table = Table("precision", "MACs", "weights", "where", title="Coverage", title_justify="left")
    for row in coverage_rows(cost):
        shares = (f"{row[key]:.2%}" for key in ("macs", "weights"))
        table.add_row(row["precision"], *shares, row["where"])
    return table


def coverage_lines(model: nn.Module, cost: Cost) -> list[str]:
    """What is not below 16 bits and why, and what the counts miss."""
    lines = []
    if any(site.low_bit for site in cost.sites):
        reasons = kept_in_float(model, cost).items()
        lines += [f"not below 16 bits: {name}: {reason}" for name, reason in reasons]
    return lines + [
        f"operations not counted: {name}; the coverage is at most what is said here"
        for name in cost.uncounted
    ]


def kept_in_float(model: nn.Module, cost: Cost) -> dict[str, str]:
    """Every product that does not run below 16 bits, by name, with the reason."""
    conversion = getattr(model, "card", Card()).conversion
    reasons = {}
    for site in cost.sites:
        if site.low_bit:
            continue
        owner = site.name.removesuffix(".qk").removesuffix(".av")
        if site.kind == TRANSFORM:
            reasons[site.name] = "it prepares an input that is then quantized"
        elif conversion is None:
            reasons[site.name] = "the model is not converted"
        elif owner in conversion.kept:
            reasons[site.name] = conversion.kept[owner]
        elif (rule := conversion.plan.match(owner)) is None:
            reasons[site.name] = "no rule of the plan matches it"
        else:
            reasons[site.name] = f"rule '{rule.pattern}' leaves an operand at {max(site.bits)} bits"
    return reasons


def product_rows(model: nn.Module, cost: Cost) -> list[dict[str, Any]]:
    """Every product for `metrics.json`: precision, costs, and why it is not below 16 bits."""
    reasons = kept_in_float(model, cost)
    return [
        {
            "layer": site.name,
            "precision": site.precision,
            "bits": max(site.bits),
            "macs": site.macs,
            "bops": site.bops,
            "weight_bytes": weight_bytes(site),
            "reason": reasons.get(site.name, ""),
        }
        for site in cost.sites
    ]


def weight_bytes(site: Site) -> float:
    """Bytes of the weight of a product, with its scales; 0 where it has none."""
    return (site.num_weights * site.bits[1] + 32 * site.num_scales) / 8


def plan_table(cost: Cost) -> Table:
    """Every product: operand widths, MACs, bit operations and bytes of its weight."""
    table = Table(title="Plan", title_justify="left")
    table.add_column("layer", no_wrap=True, overflow="fold")
    table.add_column("type")
    table.add_column("precision", no_wrap=True)
    for heading in ("MACs", "BOPs", "weight bytes"):
        table.add_column(heading, justify="right")
    for site in cost.sites:
        size = weight_bytes(site)
        numbers = (f"{site.macs:,}", f"{site.bops:,}", f"{size:,.0f}" if size else "-")
        table.add_row(site.name, site.kind, site.precision, *numbers)
    return table


def cost_items(cost: Cost) -> dict[str, Any]:
    """The costs that every `metrics.json` holds."""
    return {
        "coverage_macs": cost.coverage_macs,
        "size_bytes": cost.size_bytes,
        "num_parameters": cost.num_parameters,
        "macs": cost.macs,
        "bops": cost.bops,
        "ops": plain_ops(cost).value,
    }


def totals_table(cost: Cost, float_cost: Cost) -> Table:
    """Costs of a model beside those of its float original."""
    table = Table("", "this model", "float", "ratio", title="Totals for one image")
    table.title_justify = "left"
    ours, theirs = cost_items(cost), cost_items(float_cost)
    words = {
        "num_parameters": "parameters",
        "size_bytes": "bytes (weights at their bits, all else at 32)",
        "macs": "MACs",
        "bops": "BOPs (MACs x bits x bits)",
        "ops": "OPs (FLOPs + BOPs/64, one FLOP a MAC)",
    }
    for key, text in words.items():
        ratio = theirs[key] / ours[key]
        table.add_row(text, f"{ours[key]:,.0f}", f"{theirs[key]:,.0f}", f"{ratio:.2f}x")
    return table


def claim_lines(name: str, cost: Cost) -> list[str]:
    """For a model with published ratios: which counting conventions give them, if any."""
    lines = []
    for claim in CLAIMS:
        if claim.model != name or not any(site.bits == (1, 1) for site in cost.sites):
            continue
        for what, counts, published in (
            ("smaller", size_counts(cost), claim.size_ratio),
            ("fewer OPs", ops_counts(cost), claim.ops_ratio),
        ):
            found, tried = matches(counts, published)
            lines.append(_verdict(claim.source, what, published, found, tried))
            lines += [f"    {count.ratio:.2f}x  {count.convention}" for count in found[:6]]
    return lines


def _verdict(source: str, what: str, published: float, found: list[Count], tried: int) -> str:
    if round(found[0].ratio, 1) == published:
        fit = f"{len(found)} of {tried} conventions give it, so it does not identify one"
    else:
        fit = f"none of {tried} conventions gives it; the nearest"
    return f"{source}: {published}x {what}. {fit}:"

"""`search`: bits for every component under a budget, written as a plan that other commands read."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pytorch_lightning.cli import LightningArgumentParser
from torch import Tensor, nn

from qat import disk
from qat.cli.arguments import add_run_arguments, add_training_arguments
from qat.cli.charts.search import bits_chart, frontier_chart, sensitivity_chart
from qat.cli.charts.theme import Number, save_png
from qat.cli.console import check_coverage, console, say_untrained, show
from qat.cli.evaluation import model_items
from qat.cli.progress import RunJournal
from qat.cli.session import Session, in_run_folder
from qat.cli.start import from_checkpoint
from qat.cli.tables import read_table
from qat.cli.trackers import finish, trackers
from qat.cli.training import with_teacher
from qat.cost.count import cost
from qat.cost.latency import LatencyTable
from qat.quantizers import ObserverFactory
from qat.search import pmq
from qat.search.allocate import Allocate, Frontier, best, check_budget, frontier, totals
from qat.search.metrics import TokenFisher
from qat.search.probe import Widths, probing
from qat.search.sensitivity import Metric, Table, monotone

ROWS = {
    "mean bits of weights": ("mean_bits_weight", "{:.2f}"),
    "mean bits of activations, by MACs": ("mean_bits_activation", "{:.2f}"),
    "points of the frontier": ("n_frontier", "{:,}"),
    "seconds to initialise": ("seconds_initialise", "{:.1f}"),
    "seconds of sensitivities": ("seconds_sensitivity", "{:.1f}"),
    "seconds of the frontier": ("seconds_frontier", "{:.2f}"),
    "bytes (weights at their bits, all else at 32)": ("size_bytes", "{:,.0f}"),
    "BOPs (MACs x bits x bits)": ("bops", "{:,}"),
}


@dataclass(frozen=True)
class Search:
    """What is searched, how, and under which budget.

    Attributes:
        metric: Measures sensitivities, see `qat.search.metrics`.
        weights: Allowed widths of weights, 1 to 8; 1 needs a factory such as BinaryQuantizers.
        activations: Allowed widths of activations.
        pairs: Any pair of widths in a product, or only equal ones.
        measure: Unit of the budget: operations, bytes, or measured seconds an image.
        budget: Most that the whole model may cost; None takes the knee of the frontier.
        like: A plan whose cost is the budget, in place of a number.
        latency_table: Measured seconds, for a budget in seconds.
        allocate: Chooses within the budget; the frontier's point by default.
        observer: Chooses the ranges of the widths tried; None leaves it to the quantizers.
        num_grid_images: Calibration images that ranges are chosen on.
        labels: Give the metric the labels of the calibration images.
    """

    metric: Metric = TokenFisher()  # noqa: RUF009 - a frozen value
    weights: list[int] | tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    activations: list[int] | tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    pairs: Literal["any", "equal"] = "any"
    measure: Literal["bops", "size_bytes", "seconds"] = "bops"
    budget: float | None = None
    like: str | None = None
    latency_table: str | None = None
    allocate: Allocate = best
    observer: ObserverFactory | None = None
    num_grid_images: int = 8
    labels: bool = False

    def __post_init__(self) -> None:
        if self.budget is not None and self.like is not None:
            raise ValueError(
                "search.budget and search.like both state the budget; set one, and the other to "
                "null: --search.like null"
            )


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `search`: those of `fit`, and what is searched."""
    add_run_arguments(parser)
    add_training_arguments(parser)
    parser.add_class_arguments(Search, "search", instantiate=False)


@in_run_folder
def run(session: Session) -> None:
    """Measure, choose, write the plan, and check that it loads and converts."""
    session = from_checkpoint(session)
    session.require_new()
    session.prepare()
    folder, config = session.folder.path, session.config
    if config.model.plan is None:
        raise ValueError(
            "nothing to search: set model.plan to a plan whose operands the search may narrow, "
            "such as w8a8"
        )
    settings = Search(**session.section("search"))
    asked, session = session, with_teacher(session)
    module, data = session.module(), session.data()
    model = module.model
    space = pmq.Space(tuple(settings.weights), tuple(settings.activations), settings.pairs)
    widths, costs = pmq.slots(model, space), cost(model)
    table = settings.latency_table
    price = pmq.cost_of(settings.measure, None if table is None else LatencyTable.load(table))
    budget = _budget(session, settings, price)
    if budget is not None:  # before anything takes time
        check_budget(budget, *pmq.reach(costs, widths, space, settings.measure, price))
    data.follow(model)
    say_untrained(model)
    device = session.evaluator().strategy.root_device
    model.to(device)
    batches = [images.to(device) for images in data.calibration_batches()]
    labels = data.calibration_labels() if settings.labels else None
    with trackers(session) as loggers:
        asked.keep_recipe()
        with RunJournal(folder, console) as journal:
            begun = time.monotonic()
            module.initialise(model, batches, journal)
            measured = time.monotonic()
            omega = _sensitivities(settings, model, widths, torch.cat(batches), labels)
            solved = time.monotonic()
            task = pmq.problem(costs, omega, space, settings.measure, price)
            front = frontier(task.components)
            picks = _picks(settings, task, front, budget, session.seed)
            done = time.monotonic()
        chosen = pmq.chosen_bits(task.components, picks, omega)
        reasons = pmq.reasons(task.components, picks, costs, settings.measure)
        pmq.plan_of(model, chosen, reasons).save(folder / "plan.yaml")
        spent, loss = totals(task.components, picks)
        _write_sensitivities(folder, omega, chosen)
        rows = pmq.frontier_rows(front, task.constant, settings.measure)
        disk.write(folder / "frontier.csv", disk.csv_of(rows))
        found = _under(session, folder / "plan.yaml")
        check_coverage(found, config.require_coverage)
        bits = pmq.mean_bits(cost(found))
        items = {
            **session.items(device),
            "seconds_initialise": round(measured - begun, 3),
            "seconds_sensitivity": round(solved - measured, 3),
            "seconds_frontier": round(done - solved, 3),
            "mean_bits_weight": bits[0],
            "mean_bits_activation": bits[1],
            "metric": type(settings.metric).__name__,
            "measure": settings.measure,
            "budget": budget,
            "cost": spent + task.constant,
            "loss": loss,
            "n_calibration": sum(map(len, batches)),
            "n_frontier": len(front.costs),
            **model_items(found),
        }
        chosen = (items["cost"], loss)
        draw = partial(_draw, folder, chosen, budget, settings.measure)
        finish(session.folder, loggers, items, draw)
    rows = {f"cost, {settings.measure}": ("cost", "{:,.6g}"), **ROWS}
    show(session.folder.read_metrics(), rows, "Search")
    console.print(f"plan: {folder / 'plan.yaml'}")


def _budget(session: Session, settings: Search, price: pmq.SiteCost) -> float | None:
    if settings.like is None:
        return settings.budget
    return pmq.cost_under(settings.measure, price, _under(session, settings.like))


def _sensitivities(
    settings: Search,
    model: nn.Module,
    widths: Widths,
    images: Tensor,
    labels: Tensor | None,
) -> Table:
    """What every slot loses at each of its widths; no more at more bits."""
    grids = images[: settings.num_grid_images]
    with probing(model, grids, widths, settings.observer) as probes:
        return monotone(settings.metric(model, probes, images, labels))


def _picks(
    settings: Search, task: pmq.Problem, front: Frontier, budget: float | None, seed: int
) -> tuple[int, ...]:
    """The choice of each component: within the budget, or at the knee where there is none."""
    if budget is None:
        return front.picks(front.knee())
    return settings.allocate(task.components, budget - task.constant, seed)


def _under(session: Session, plan: str | Path) -> nn.Module:
    """The recipe's model under another plan."""
    return session.changed({"model.plan": str(plan)}).model()


def _write_sensitivities(folder: Path, omega: Table, chosen: dict[pmq.Slot, int]) -> None:
    rows = [
        {"module": slot.module, "operand": str(slot.operand), "bits": bits, "sensitivity": value,
         "chosen": int(chosen[slot] == bits)}
        for slot, row in omega.items()
        for bits, value in row.items()
    ]  # fmt: skip
    disk.write(folder / "sensitivity.csv", disk.csv_of(rows))


def _draw(folder: Path, chosen: tuple[Number, Number], budget: Number | None, measure: str) -> None:
    """Pictures of the two tables."""
    rows = read_table(folder / "sensitivity.csv")
    save_png([sensitivity_chart(rows), bits_chart(rows)], folder / "sensitivity.png")
    front = read_table(folder / "frontier.csv")
    save_png([frontier_chart(front, chosen, budget, measure)], folder / "frontier.png")

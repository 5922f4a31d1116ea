"""`quantize`: post-training quantization by any initialiser, compared with the float model."""

import copy
import time
from statistics import mean
from typing import Any

from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning.cli import LightningArgumentParser
from rich.table import Table

from qat import checkpoint as files
from qat.cli.arguments import (
    add_draws_argument,
    add_grid_argument,
    add_patchwise_argument,
    add_run_arguments,
    add_training_arguments,
)
from qat.cli.console import check_coverage, console, say_untrained, show
from qat.cli.evaluation import model_items, patchwise_as_asked
from qat.cli.grid import continuing, grid_table, run_grid
from qat.cli.progress import RunJournal
from qat.cli.session import Session, in_run_folder
from qat.cli.start import from_checkpoint
from qat.cli.trackers import finish, trackers
from qat.cli.training import with_judge, with_teacher
from qat.lightning.tasks import Task

ROWS = {
    "calibration images": ("n_calibration", "{:,}"),
    "seconds of calibration": ("seconds_calibration", "{:.1f}"),
    "bytes (weights at their bits, all else at 32)": ("size_bytes", "{:,.0f}"),
    "MACs below 16 bits": ("coverage_macs", "{:.2%}"),
    "BOPs (MACs x bits x bits)": ("bops", "{:,}"),
}


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `quantize`: those of `fit`, and a grid of recipes to compare."""
    add_run_arguments(parser)
    add_training_arguments(parser)
    add_grid_argument(parser)
    add_draws_argument(parser)
    add_patchwise_argument(parser)


@in_run_folder
def run(session: Session) -> None:
    """Quantize once, or once for each choice of the grid, and print a table."""
    session = from_checkpoint(session)
    if session.config.grid is None:
        quantize(session)
        show(session.folder.read_metrics(), {**session.task().rows, **ROWS})
    else:
        compare(session)
    console.print(f"run folder: {session.folder.path}")


def quantize(asked: Session) -> None:
    """Initialise, evaluate and save one model into a run folder."""
    config = asked.config
    resume = asked.resumes()
    session = with_judge(with_teacher(asked))
    session.prepare()
    task, module, data = session.task(), session.module(), session.data()
    model = module.model
    if config.model.plan is None:
        raise ValueError("nothing to quantize: set model.plan to a plan, such as w4a4")
    original = copy.deepcopy(model).eval()
    data.follow(model)
    check_coverage(model, config.require_coverage)
    say_untrained(model)
    evaluator = session.evaluator()
    device = evaluator.strategy.root_device
    model.to(device)
    batches = [move_data_to_device(batch, device) for batch in task.calibration_batches(data)]
    with trackers(session) as loggers:
        asked.keep_recipe()
        begun = time.monotonic()
        with RunJournal(session.folder.path, console, resume=resume) as journal:
            module.initialise(model, batches, journal)
        seconds = time.monotonic() - begun
        files.save(model, session.folder.path / "model.ckpt")  # whatever comes of the evaluation
        with patchwise_as_asked(session, model):
            measured = task.compare(
                model.eval(), original, data, evaluator, session.folder.path, session.remembered
            )
            costs = model_items(model)
        items = {
            **session.items(device),
            **measured,
            "seconds_calibration": round(seconds, 3),
            "resumed": resume,
            "n_calibration": sum(
                len(batch[0] if isinstance(batch, tuple) else batch) for batch in batches
            ),
            **journal.notes,
            **costs,
        }
        finish(session.folder, loggers, items)
    journal.clear()


def compare(session: Session) -> None:
    """Run every choice of the grid, each into a folder of its own; those that are done stay."""
    session = with_judge(with_teacher(session))
    task, config = session.task(), session.config
    rows: list[dict[str, Any]] = []
    for rows in run_grid(session, lambda chosen: quantize(continuing(chosen))):
        console.print(comparison_table(rows, list(config.grid), task))
    shared = ("device", "torch_version", task.headline, "n_images")
    first = {key: rows[0][key] for key in shared if key in rows[0]}
    items = session.items(first["device"])
    session.folder.write_metrics({**items, **first, "draws": config.draws, "table": rows})


def comparison_table(rows: list[dict[str, Any]], keys: list[str], task: Task) -> Table:
    """A row for each choice of the grid."""
    known = [row[task.headline] for row in rows if task.headline in row]
    title = f"Comparison; {task.headline} {mean(known):.4f}" if known else "Comparison"
    return grid_table(title, rows, keys, task.columns)

"""`quantize`: post-training quantization by any initialiser, compared with the float model."""

import copy
import time
from statistics import mean
from typing import Any

from jsonargparse import Namespace
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning.cli import LightningArgumentParser
from rich.table import Table

from qat import checkpoint as files
from qat.cli.commands.common import (
    add_patchwise_argument,
    add_run_arguments,
    add_training_arguments,
    check_coverage,
    console,
    keep_recipe,
    make_data,
    make_judge,
    make_module,
    make_task,
    model_items,
    patchwise_as_asked,
    prepare,
    recipe_name,
    resumes,
    run_items,
    show,
    trainer_arguments,
)
from qat.cli.commands.fit import train_judge
from qat.cli.grid import add_grid_arguments, continuing, grid_table, run_grid
from qat.cli.progress import RunJournal
from qat.cli.run_folder import RunFolder
from qat.cli.trackers import finish, trackers
from qat.lightning.tasks import Task
from qat.models import num_classes_of
from qat.preprocessing import expected_by

HELP = "quantize a trained model on a few images without labels, compare it with float, save it"
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
    add_grid_arguments(parser)
    add_patchwise_argument(parser)


def run(parser: LightningArgumentParser, config: Namespace) -> None:
    """Quantize once, or once for each choice of the grid, and print a table."""
    folder = RunFolder.named(config.run_dir, recipe_name(config))
    if config.grid is None:
        quantize(parser, config, folder)
        show(folder.read_metrics(), {**make_task(parser, config).rows, **ROWS})
    else:
        compare(parser, config, folder)
    console.print(f"run folder: {folder.path}")


def quantize(parser: LightningArgumentParser, config: Namespace, folder: RunFolder) -> None:
    """Initialise, evaluate and save one model into a run folder."""
    started = time.monotonic()
    if config.ckpt_path not in (None, "last"):
        raise ValueError(
            f"quantize starts from a float model, not from checkpoint '{config.ckpt_path}'; name "
            "its weights as model.model or model.teacher, or continue a run with --ckpt_path last"
        )
    resume, recipe = resumes(parser, config, folder), config.clone()
    train_judge(parser, config, folder)
    prepare(config)
    task = make_task(parser, config)
    module, data = make_module(parser, config), make_data(parser, config)
    model = module.model
    if config.model.plan is None:
        raise ValueError("nothing to quantize: set model.plan to a plan, see configs/plans/")
    original = copy.deepcopy(model).eval()
    data.attach(expected_by(model), num_classes_of(model))
    check_coverage(model, config.require_coverage)
    judge = make_judge(trainer_arguments(parser, config), folder)
    device = judge.strategy.root_device
    model.to(device)
    batches = [move_data_to_device(batch, device) for batch in task.calibration_batches(data)]
    with trackers(parser, config, folder) as loggers:
        keep_recipe(parser, recipe, folder)
        begun = time.monotonic()
        with RunJournal(folder.path, console, resume=resume) as journal:
            module.initialise(model, batches, journal)
        seconds = time.monotonic() - begun
        with patchwise_as_asked(parser, model, config):
            measured = task.compare(model.eval(), original, data, judge, folder.path)
            costs = model_items(model)
        files.save(model, folder.path / "model.ckpt")
        items = {
            **run_items("quantize", config, started, device),
            **measured,
            "seconds_calibration": round(seconds, 3),
            "resumed": resume,
            "n_calibration": sum(
                len(batch[0] if isinstance(batch, tuple) else batch) for batch in batches
            ),
            **journal.notes,
            **costs,
        }
        finish(folder, loggers, items)
    journal.clear()


def compare(parser: LightningArgumentParser, config: Namespace, folder: RunFolder) -> None:
    """Run every choice of the grid, each into a folder of its own; those that are done stay."""
    started = time.monotonic()

    def run_one(overlaid: Namespace, chosen: RunFolder) -> None:
        quantize(parser, continuing(overlaid, chosen), chosen)

    rows: list[dict[str, Any]] = []
    train_judge(parser, config, folder)
    task = make_task(parser, config)
    for rows in run_grid(parser, config, folder, run_one):
        console.print(comparison_table(rows, list(config.grid), task))
    shared = ("device", "torch_version", task.headline, "n_images")
    first = {key: rows[0][key] for key in shared if key in rows[0]}
    items = run_items("quantize", config, started, first["device"])
    folder.write_metrics({**items, **first, "draws": config.draws, "table": rows})


def comparison_table(rows: list[dict[str, Any]], keys: list[str], task: Task) -> Table:
    """A row for each choice of the grid."""
    title = f"Comparison; {task.headline} {mean(row[task.headline] for row in rows):.4f}"
    return grid_table(title, rows, keys, task.columns)

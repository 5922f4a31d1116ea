"""`quantize`: post-training quantization by any initialiser, compared with the float model."""

import copy
import time
from functools import partial
from statistics import mean
from typing import Any

from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser
from rich.table import Table

from qat import checkpoint as files
from qat.lightning.commands.common import (
    add_run_arguments,
    add_training_arguments,
    check_coverage,
    console,
    make_data,
    make_judge,
    make_module,
    model_items,
    prepare,
    recipe_name,
    resumes,
    run_items,
    trainer_arguments,
)
from qat.lightning.comparison import Comparison
from qat.lightning.grid import add_grid_arguments, grid_table, run_grid
from qat.lightning.progress import RunJournal
from qat.lightning.run_folder import RunFolder
from qat.models import num_classes_of
from qat.preprocessing import expected_by

HELP = "quantize a trained model on a few images without labels, compare it with float, save it"
COLUMNS = {"top1": 4, "agreement": 4, "logit_error": 4, "seconds_calibration": 1}


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `quantize`: those of `fit`, and a grid of recipes to compare."""
    add_run_arguments(parser)
    add_training_arguments(parser)
    add_grid_arguments(parser)


def run(parser: LightningArgumentParser, config: Namespace) -> None:
    """Quantize once, or once for each choice of the grid, and print a table."""
    folder = RunFolder.named(config.run_dir, recipe_name(config))
    if config.grid is None:
        quantize(parser, config, folder)
        console.print(result_table(folder.read_metrics()))
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
    resume = resumes(parser, config, folder)
    prepare(config)
    module, data = make_module(parser, config), make_data(parser, config)
    model = module.model
    if config.model.plan is None:
        raise ValueError("nothing to quantize: set model.plan to a plan, see configs/plans/")
    original = copy.deepcopy(model).eval()
    data.attach(expected_by(model), num_classes_of(model))
    check_coverage(model, config.require_coverage)
    judge = make_judge(trainer_arguments(parser, config), folder)
    model.to(judge.strategy.root_device)
    batches = [images.to(judge.strategy.root_device) for images in data.calibration_batches()]
    folder.path.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with RunJournal(folder.path, console, resume=resume) as journal:
        module.initialise(model, batches, journal)
    seconds = time.monotonic() - begun
    comparison = Comparison(model.eval(), original)
    judge.validate(comparison, datamodule=data, verbose=False)
    files.save(model, folder.path / "model.ckpt")
    folder.write_metrics(
        {
            **run_items("quantize", config, started, judge.strategy.root_device),
            **comparison.items(),
            "seconds_calibration": round(seconds, 3),
            "resumed": resume,
            "n_calibration": sum(len(images) for images in batches),
            **journal.notes,
            **model_items(model),
        }
    )
    journal.clear()


def compare(parser: LightningArgumentParser, config: Namespace, folder: RunFolder) -> None:
    """Run every choice of the grid, each into a folder of its own; those that are done stay."""
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    for rows in run_grid(parser, config, folder, partial(quantize, parser)):
        console.print(comparison_table(rows, list(config.grid)))
    first = {key: rows[0][key] for key in ("device", "torch_version", "top1_float", "n_images")}
    items = run_items("quantize", config, started, first["device"])
    folder.write_metrics({**items, **first, "draws": config.draws, "table": rows})


def result_table(items: dict[str, Any]) -> Table:
    """What one run measured."""
    table = Table("", "value", title="Result", title_justify="left")
    rows = {
        "top-1": ("top1", "{:.4f}"),
        "top-1, float": ("top1_float", "{:.4f}"),
        "agreement with float": ("agreement", "{:.4f}"),
        "logit error, relative": ("logit_error", "{:.4f}"),
        "evaluation images": ("n_images", "{:,}"),
        "calibration images": ("n_calibration", "{:,}"),
        "seconds of calibration": ("seconds_calibration", "{:.1f}"),
        "bytes (weights at their bits, all else at 32)": ("size_bytes", "{:,.0f}"),
        "MACs below 16 bits": ("coverage_macs", "{:.2%}"),
        "BOPs (MACs x bits x bits)": ("bops", "{:,}"),
    }
    for label, (key, form) in rows.items():
        table.add_row(label, form.format(items[key]))
    return table


def comparison_table(rows: list[dict[str, Any]], keys: list[str]) -> Table:
    """A row for each choice of the grid."""
    title = f"Comparison; float top-1 {mean(row['top1_float'] for row in rows):.4f}"
    return grid_table(title, rows, keys, COLUMNS)

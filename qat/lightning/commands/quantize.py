"""`quantize`: post-training quantization by any initialiser, compared with the float model."""

import copy
import time
from statistics import mean, stdev
from typing import Any

from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser
from rich.table import Table

from qat import checkpoint as files
from qat.lightning.commands.common import (
    add_grid_argument,
    add_patchwise_argument,
    add_run_arguments,
    add_training_arguments,
    check_coverage,
    choices,
    console,
    make_data,
    make_judge,
    make_module,
    model_items,
    overlay,
    patchwise_as_asked,
    prepare,
    recipe_name,
    run_items,
    trainer_arguments,
)
from qat.lightning.comparison import Comparison
from qat.lightning.progress import RunJournal
from qat.lightning.run_folder import RunFolder
from qat.models import num_classes_of
from qat.preprocessing import expected_by

HELP = "quantize a trained model on a few images without labels, compare it with float, save it"
COLUMNS = ("top1", "agreement", "logit_error", "seconds_calibration")


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `quantize`: those of `fit`, and a grid of recipes to compare."""
    add_run_arguments(parser)
    add_training_arguments(parser)
    add_grid_argument(parser)
    add_patchwise_argument(parser)
    parser.add_argument("--draws", type=int, default=1, help="Seeds of each choice of the grid.")


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
    resume = _resumes(parser, config, folder)
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
    with patchwise_as_asked(parser, model, config):
        judge.validate(comparison, datamodule=data, verbose=False)
        costs = model_items(model)
    files.save(model, folder.path / "model.ckpt")
    folder.write_metrics(
        {
            **run_items("quantize", config, started, judge.strategy.root_device),
            **comparison.items(),
            "seconds_calibration": round(seconds, 3),
            "resumed": resume,
            "n_calibration": sum(len(images) for images in batches),
            **journal.notes,
            **costs,
        }
    )
    journal.clear()


def compare(parser: LightningArgumentParser, config: Namespace, folder: RunFolder) -> None:
    """Run every choice of the grid, each into a folder of its own; those that are done stay."""
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    for names, paths in choices(config.grid):
        for seed in range(config.seed_everything, config.seed_everything + config.draws):
            chosen = RunFolder(folder.path / "-".join([*names.values(), str(seed)]))
            if not chosen.metrics.exists():
                console.rule(" ".join([*names.values(), f"seed {seed}"]))
                overlaid = overlay(parser, config, paths, seed)
                overlaid.ckpt_path = "last" if (chosen.path / "config.yaml").exists() else None
                quantize(parser, overlaid, chosen)
            rows.append({**names, **chosen.read_metrics()})
            console.print(comparison_table(rows, list(config.grid)))
    first = {key: rows[0][key] for key in ("device", "torch_version", "top1_float", "n_images")}
    items = run_items("quantize", config, started, first["device"])
    folder.write_metrics({**items, **first, "draws": config.draws, "table": rows})


def _resumes(parser: LightningArgumentParser, config: Namespace, folder: RunFolder) -> bool:
    """Whether this run continues one in the folder; keeps the recipe there if it does not.

    Raises:
        ValueError: If the folder holds a run that is complete, that nobody asked to continue, or
            that had another recipe.
    """
    path = folder.path / "config.yaml"
    settings = config.clone()
    settings.ckpt_path = settings.config = settings.run_dir = None
    text = parser.dump(settings, skip_validation=True)
    if config.ckpt_path not in (None, "last"):
        raise ValueError(
            f"quantize starts from a float model, not from checkpoint '{config.ckpt_path}'; name "
            "its weights as model.model or model.teacher, or continue a run with --ckpt_path last"
        )
    if folder.metrics.exists() or (path.exists() and config.ckpt_path is None):
        raise ValueError(
            f"run folder '{folder.path}' already holds a run; continue an incomplete one with "
            "--ckpt_path last, or choose another --run_dir"
        )
    if config.ckpt_path is None:
        folder.path.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return False
    if not path.exists():
        raise ValueError(f"no run to continue in '{folder.path}'; leave --ckpt_path out")
    if path.read_text() != text:
        raise ValueError(
            f"the run in '{folder.path}' had another recipe; continue it with the one kept in its "
            "config.yaml, or choose another --run_dir"
        )
    return True


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
    """A row for each choice of the grid: mean over its draws, and standard deviation."""
    title = f"Comparison; float top-1 {mean(row['top1_float'] for row in rows):.4f}"
    table = Table(*keys, "draws", *COLUMNS, title=title, title_justify="left")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for names, group in groups.items():
        cells = []
        for column in COLUMNS:
            values = [row[column] for row in group]
            spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
            digits = 1 if column.startswith("seconds") else 4
            cells.append(f"{mean(values):.{digits}f}{spread if digits > 1 else ''}")
        table.add_row(*names, str(len(group)), *cells)
    return table

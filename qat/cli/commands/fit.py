"""`fit`: teacher training, distillation, quantization-aware training, binarization."""

import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser
from rich.table import Table

from qat.cli.commands.common import (
    add_run_arguments,
    add_training_arguments,
    check_coverage,
    console,
    evaluate,
    make_data,
    make_judge,
    make_module,
    make_task,
    make_trainer,
    model_items,
    prepare,
    recipe_name,
    run_items,
    trainer_arguments,
    with_initialiser,
)
from qat.cli.progress import RunJournal
from qat.cli.run_folder import RunFolder, is_first_process
from qat.cli.trackers import finish, trackers
from qat.lightning.callbacks import OrderlyInterrupt, OscillationTracker
from qat.lightning.data import VisionData
from qat.lightning.tasks import Task
from qat.lightning.training import Training
from qat.models import num_classes_of
from qat.preprocessing import expected_by
from qat.quantizers import quantizers

HELP = "train: a teacher, a quantized or a binary model, with or without distillation"


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `fit`."""
    add_run_arguments(parser)
    add_training_arguments(parser)


def run(parser: LightningArgumentParser, config: Namespace) -> None:
    """Train as the recipe says, evaluate, and print the comparison with the teacher."""
    folder = RunFolder.named(config.run_dir, recipe_name(config))
    train(parser, config, folder)
    if is_first_process():
        console.print(comparison_table(folder))
    console.print(f"run folder: {folder.path}")


def train(parser: LightningArgumentParser, config: Namespace, folder: RunFolder) -> None:
    """One training run, its teacher first, into a run folder."""
    started = time.monotonic()
    resume = _find_checkpoint(config, folder)
    with_initialiser(parser, config)  # a misspelt one is refused before a teacher is trained
    folder.path.mkdir(parents=True, exist_ok=True)
    if config.teacher_config and config.model.teacher is None:
        teacher = _train_first(parser, config, folder, "teacher", config.teacher_config)
        config.model.teacher = str(teacher)
    if resume is None and is_first_process():
        parser.save(config, str(folder.recipe), overwrite=True, skip_validation=True)
    train_judge(parser, config, folder)
    prepare(config)
    task = make_task(parser, config)
    module, data = make_module(parser, config), make_data(parser, config)
    settings = trainer_arguments(parser, config)
    data.attach(expected_by(module.model), num_classes_of(module.model))
    check_coverage(module.model, config.require_coverage)
    step = None if resume is None else _step(resume)
    tracker = OscillationTracker()
    interrupt = OrderlyInterrupt()
    callbacks = [*(settings["callbacks"] or []), interrupt, *_checkpoints(folder, *task.monitor)]
    if any(True for _ in quantizers(module.model)):
        callbacks.append(tracker)
    with trackers(parser, config, folder) as loggers:
        trainer = make_trainer(
            settings, folder, logger=[folder.logger(step), *loggers], callbacks=callbacks
        )
        try:
            with RunJournal(folder.path, console, waits=True) as module.journal:
                trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
            module.journal.clear()
            interrupted = interrupt.asked
        except SystemExit:  # how Lightning ends after Ctrl-C, its checkpoint written
            interrupted = True
        if interrupted:
            console.print(f"interrupted; continue with --run_dir {folder.path} --ckpt_path last")
            raise KeyboardInterrupt
        items = {
            **run_items("fit", config, started, trainer.strategy.root_device),
            **_judge(task, module, data, make_judge(settings, folder), folder),
            "epochs": trainer.current_epoch,
            **tracker.summary(),
        }
        finish(folder, loggers, items)


def _judge(
    task: Task, module: Training, data: VisionData, judge: Trainer, folder: RunFolder
) -> dict[str, Any]:
    """Measures and costs of the trained model, and those of its teacher as `<key>_teacher`."""
    items = evaluate(task, module.model, data, judge, folder) | model_items(module.model)
    if module.teacher is not None:
        costs = model_items(module.teacher)
        teacher = evaluate(task, module.teacher, data, judge, folder) | costs
        items |= {f"{key}_teacher": teacher[key] for key in ("top1", "n_images", *costs)}
    return items


def comparison_table(folder: RunFolder) -> Table:
    """The trained model beside its teacher, from what both runs wrote down."""
    table = Table(title="Result", title_justify="left")
    items = folder.read_metrics()
    columns = (
        {"model": ""} if "top1_teacher" not in items else {"teacher": "_teacher", "student": ""}
    )
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    rows = {
        "top-1": ("top1", "{:.4f}"),
        "noise error": ("noise_error", "{:.5f}"),
        "class accuracy of samples": ("class_accuracy", "{:.4f}"),
        "evaluation images": ("n_images", "{:,}"),
        "parameters": ("num_parameters", "{:,}"),
        "bytes (weights at their bits, all else at 32)": ("size_bytes", "{:,.0f}"),
        "MACs below 16 bits": ("coverage_macs", "{:.2%}"),
        "BOPs (MACs x bits x bits)": ("bops", "{:,}"),
        "OPs (FLOPs + BOPs/64)": ("ops", "{:,.0f}"),
        "flip rate, mean over training": ("flip_rate", "{:.6f}"),
        "flip rate, at 80 to 90 % of it": ("flip_rate_late", "{:.6f}"),
        "weights that changed code": ("changed", "{:.4f}"),
        "sign entropy, bits": ("sign_entropy", "{:.4f}"),
        "dead channels": ("dead_channels", "{:.4f}"),
        "seconds, teacher included": ("seconds", "{:.1f}"),
    }
    for label, (key, form) in rows.items():
        keys = [key + suffix for suffix in columns.values()]
        values = [form.format(items[k]) if k in items else "-" for k in keys]
        if any(value != "-" for value in values):
            table.add_row(label, *values)
    return table


def _checkpoints(folder: RunFolder, monitor: str, mode: str) -> list[ModelCheckpoint]:
    """The last state, written each epoch and on any exception, and the best one."""
    options: dict[str, Any] = {"dirpath": folder.checkpoints, "enable_version_counter": False}
    return [
        ModelCheckpoint(filename="last", save_on_exception=True, **options),
        ModelCheckpoint(filename="best", monitor=monitor, mode=mode, **options),
    ]


def _find_checkpoint(config: Namespace, folder: RunFolder) -> Path | None:
    """The checkpoint to resume from; None also where only the teacher has been trained so far."""
    begun = (folder.path / "teacher").is_dir() and not folder.last.exists()
    if config.ckpt_path == "last" and begun and not folder.metrics.exists():
        return None
    return folder.checkpoint_to_resume(config.ckpt_path)


def train_judge(parser: LightningArgumentParser, config: Namespace, folder: RunFolder) -> None:
    """Give the task a judge, trained in `<run folder>/judge`, where the recipe has one to train."""
    arguments = config.task.get("init_args") or Namespace()
    if config.judge_config is None or arguments.get("judge") is not None:
        return
    if "judge" not in arguments:
        raise ValueError("judge_config has no effect: the task knows no judge; remove it")
    arguments.judge = str(_train_first(parser, config, folder, "judge", config.judge_config))


def _train_first(
    parser: LightningArgumentParser, config: Namespace, folder: RunFolder, name: str, recipe: str
) -> Path:
    """A model's checkpoint; trains it in `<run folder>/<name>` unless that is done."""
    first = RunFolder(folder.path / name)
    if not first.metrics.exists():
        arguments = ["--config", recipe, "--run_dir", str(first.path)]
        arguments += ["--seed_everything", str(config.seed_everything)]
        if first.last.exists():
            arguments += ["--ckpt_path", "last"]
        console.rule(f"{name}: {recipe}")
        train(parser, parser.parse_args(arguments), first)
        console.rule(f"{name} done")
    return first.last


def _step(path: Path) -> int:
    return int(torch.load(path, map_location="cpu", weights_only=True)["global_step"])

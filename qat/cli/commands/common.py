"""What several commands share: arguments, trainer, evaluation, and what every run reports."""

import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table
from torch import nn

from qat.cli.run_folder import RunFolder, is_first_process
from qat.cost.count import cost
from qat.cost.coverage import cost_items, coverage_lines, coverage_table
from qat.lightning.data import VisionData
from qat.lightning.modules import Distillation
from qat.lightning.tasks import Task
from qat.lightning.training import Training
from qat.models import num_classes_of
from qat.patchwise import PatchBits, patchwise
from qat.preprocessing import expected_by

WIDTH_OF_FILES = 160
"""Columns where the output goes to a file, so that no table loses digits there."""

console = Console(
    quiet=not is_first_process(), width=None if sys.stdout.isatty() else WIDTH_OF_FILES
)


def add_run_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of every command that leaves a run folder."""
    parser.add_argument("--run_dir", type=str | None, default=None, help="Folder of the run.")
    parser.add_argument("--seed_everything", type=int, default=0, help="Seed of everything.")
    parser.add_argument(
        "--num_threads",
        type=int | None,
        default=None,
        help="Processor threads of torch; tiny models are fastest on one.",
    )
    parser.add_argument(
        "--require_coverage",
        type=float | None,
        default=None,
        help="Fail if a smaller share of the MACs runs below 16 bits.",
    )
    parser.add_argument(
        "--ckpt_path", type=str | None, default=None, help="Checkpoint; fit also takes `last`."
    )


def add_training_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of a recipe: trainer, model, data, and the recipe of the teacher."""
    parser.add_argument(
        "--teacher_config",
        type=str | None,
        default=None,
        help="Recipe that trains the teacher first, where model.teacher names none.",
    )
    parser.add_argument(
        "--init",
        type=str | None,
        default=None,
        help="Short for model.initialise, what sets the quantizers' starting state; such as "
        "ptq_init.repq_vit.RepQViT.",
    )
    parser.add_argument(
        "--judge_config",
        type=str | None,
        default=None,
        help="Recipe that trains the judge of a task first, where task.judge names none.",
    )
    parser.add_subclass_arguments(Task, "task", help="What the model is for.")
    parser.set_defaults({"task": {"class_path": "qat.lightning.tasks.Classification"}})
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.set_defaults(
        {
            "trainer.enable_model_summary": False,
            "trainer.use_distributed_sampler": False,
            "trainer.log_every_n_steps": 10,
        }
    )
    parser.add_class_arguments(Distillation, "model", instantiate=False)
    parser.add_class_arguments(VisionData, "data", skip={"seed"}, instantiate=False)


def add_patchwise_argument(parser: LightningArgumentParser) -> None:
    """The argument of commands that evaluate a quantized model."""
    parser.add_argument(
        "--patchwise",
        type=PatchBits | None,
        default=None,
        help="Spread each layer's activation bits over the patches of an image at inference.",
    )


@contextmanager
def patchwise_as_asked(
    parser: LightningArgumentParser, model: nn.Module, config: Namespace
) -> Iterator[None]:
    """Patch-wise bits within the block, where the user asked for them."""
    bits = parser.instantiate(Namespace(patchwise=config.patchwise)).patchwise
    with nullcontext() if bits is None else patchwise(model, bits):
        yield


def prepare(config: Namespace) -> None:
    """Threads and seeds, before anything is built."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    seed_everything(config.seed_everything, verbose=False)


def resumes(parser: LightningArgumentParser, config: Namespace, folder: RunFolder) -> bool:
    """Whether this run continues one in the folder.

    Raises:
        ValueError: If the folder holds a run that is complete, that nobody asked to continue, or
            that had another recipe.
    """
    if folder.metrics.exists() or (folder.recipe.exists() and config.ckpt_path != "last"):
        raise ValueError(
            f"run folder '{folder.path}' already holds a run; continue an incomplete one with "
            "--ckpt_path last, or choose another --run_dir"
        )
    if config.ckpt_path != "last":
        return False
    if not folder.recipe.exists():
        raise ValueError(f"no run to continue in '{folder.path}'; leave --ckpt_path out")
    if folder.recipe.read_text() != _recipe(parser, config):
        raise ValueError(
            f"the run in '{folder.path}' had another recipe; continue it with the one kept in its "
            "config.yaml, or choose another --run_dir"
        )
    return True


def keep_recipe(parser: LightningArgumentParser, config: Namespace, folder: RunFolder) -> None:
    """Keep the resolved recipe in the run folder.

    To be called once all is checked, so that a refused run leaves no folder behind.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.recipe.write_text(_recipe(parser, config))


def _recipe(parser: LightningArgumentParser, config: Namespace) -> str:
    settings = config.clone()
    settings.ckpt_path = settings.config = settings.run_dir = None
    return parser.dump(settings, skip_validation=True)


def make_task(parser: LightningArgumentParser, config: Namespace) -> Task:
    """What the model of a recipe is for."""
    return parser.instantiate(Namespace({"task": config.task})).task


def with_initialiser(parser: LightningArgumentParser, config: Namespace) -> Namespace:
    """The configuration with what `--init` is short for."""
    if config.init is None:
        return config
    chosen = {"model": {"initialise": {"class_path": config.init}}}
    return parser.parse_object(chosen, config)


def make_module(parser: LightningArgumentParser, config: Namespace) -> Training:
    """The Lightning module of a recipe; builds the model and loads the teacher."""
    config = with_initialiser(parser, config)
    return make_task(parser, config).module(**arguments_of(parser, config, "model"))


def make_data(parser: LightningArgumentParser, config: Namespace) -> VisionData:
    """The data module of a recipe; reads the data."""
    return VisionData(**arguments_of(parser, config, "data"), seed=config.seed_everything)


def trainer_arguments(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """The trainer's arguments of a recipe, its callbacks built; `trackers` builds its loggers."""
    config = config.clone()
    config.trainer.logger = False
    return arguments_of(parser, config, "trainer")


def arguments_of(parser: LightningArgumentParser, config: Namespace, part: str) -> dict[str, Any]:
    """The arguments in a section of a recipe, their objects built."""
    objects = parser.instantiate(Namespace({part: config[part]}))
    return dict(objects[part].items(branches=True, nested=False))


def make_trainer(arguments: dict[str, Any], folder: RunFolder, **changes: Any) -> Trainer:
    """A trainer with the recipe's arguments, some of them changed."""
    return Trainer(**{**arguments, "default_root_dir": str(folder.path), **changes})


def make_judge(arguments: dict[str, Any], folder: RunFolder) -> Trainer:
    """A trainer that only evaluates: the recipe's arguments, without callbacks."""
    return make_trainer(arguments, folder, enable_checkpointing=False, callbacks=[])


def check_coverage(model: nn.Module, required: float | None) -> None:
    """Print the coverage of a model, and refuse one that is too low.

    Raises:
        ValueError: If less than `required` of the MACs runs below 16 bits.
    """
    costs = cost(model)
    console.print(coverage_table(costs))
    for line in coverage_lines(model, costs):
        console.print(line, highlight=False)
    if required is not None and costs.coverage_macs < required:
        raise ValueError(
            f"coverage is {costs.coverage_macs:.4f} of the MACs, below the required {required}; "
            "the lines above list what stayed in float and why"
        )


def evaluate(
    task: Task, model: nn.Module, data: VisionData, trainer: Trainer, folder: RunFolder
) -> dict[str, Any]:
    """Measures of a model on the evaluation images."""
    data.attach(expected_by(model), num_classes_of(model))
    return task.evaluate(model, data, trainer, folder.path)


def show(items: dict[str, Any], rows: Mapping[str, tuple[str, str]], title: str = "Result") -> None:
    """Print those of a run's results that a table has rows for."""
    table = Table("", "value", title=title, title_justify="left")
    for label, (key, form) in rows.items():
        if key in items:
            table.add_row(label, form.format(items[key]))
    console.print(table)


def run_items(command: str, config: Namespace, started: float, device: Any) -> dict[str, Any]:
    """What every `metrics.json` says of its run."""
    return {
        "command": command,
        "recipe": recipe_name(config),
        "seed": config.seed_everything,
        "seconds": round(time.monotonic() - started, 3),
        "device": str(device),
        "processor": platform.processor() or platform.machine(),
        "torch_version": str(torch.__version__),
    }


def model_items(model: nn.Module) -> dict[str, Any]:
    """Costs of a model, for `metrics.json`."""
    return cost_items(cost(model))


def recipe_name(config: Namespace) -> str:
    """Name of the first recipe file, without folder and ending."""
    paths = config.config or []
    return Path(str(paths[0])).stem if paths else "flags"

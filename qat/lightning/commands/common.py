"""What several commands share: arguments, trainer, evaluation, and what every run reports."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.loggers import Logger
from rich.console import Console
from torch import nn

from qat.lightning.data import VisionData
from qat.lightning.modules import Distillation
from qat.lightning.recipe import load_recipe
from qat.lightning.run_folder import RunFolder, is_first_process
from qat.losses import Objective
from qat.models import num_classes_of
from qat.preprocessing import expected_by
from qat.report import cost_items, coverage_lines, coverage_table
from qat.search.cost import cost
from qat.search.patchwise import PatchBits, patchwise

console = Console(quiet=not is_first_process())


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


def add_grid_argument(parser: LightningArgumentParser) -> None:
    """The argument of commands that go through a grid of recipes."""
    parser.add_argument(
        "--grid",
        type=dict[str, list[str]] | None,
        default=None,
        help="Lists of recipe files; every choice of one of each is laid over the recipe and run.",
    )


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


def choices(grid: dict[str, list[str]]) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    """Every choice of one file of each list: the names of the files by key, and their paths."""
    for paths in product(*grid.values()):
        yield {key: Path(path).stem for key, path in zip(grid, paths, strict=True)}, paths


def overlay(
    parser: LightningArgumentParser, config: Namespace, paths: tuple[str, ...], seed: int
) -> Namespace:
    """The configuration with further recipe files laid over it."""
    overlaid = config.clone()
    overlaid.grid, overlaid.seed_everything = None, seed
    for path in paths:
        overlaid = parser.parse_object(load_recipe(path), overlaid)
    return overlaid


def prepare(config: Namespace) -> None:
    """Threads and seeds, before anything is built."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    seed_everything(config.seed_everything, verbose=False)


def make_module(parser: LightningArgumentParser, config: Namespace) -> Distillation:
    """The Lightning module of a recipe; builds the model and loads the teacher."""
    if config.init is not None:
        chosen = {"model": {"initialise": {"class_path": config.init}}}
        config = parser.parse_object(chosen, config)
    return Distillation(**_arguments(parser, config, "model"))


def make_data(parser: LightningArgumentParser, config: Namespace) -> VisionData:
    """The data module of a recipe; reads the data."""
    return VisionData(**_arguments(parser, config, "data"), seed=config.seed_everything)


def trainer_arguments(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """The trainer's arguments of a recipe, its loggers and callbacks built."""
    return _arguments(parser, config, "trainer")


def _arguments(parser: LightningArgumentParser, config: Namespace, part: str) -> dict[str, Any]:
    objects = parser.instantiate(Namespace({part: config[part]}))
    return dict(objects[part].items(branches=True, nested=False))


def make_trainer(arguments: dict[str, Any], folder: RunFolder, **changes: Any) -> Trainer:
    """A trainer with the recipe's arguments, but the loggers and callbacks of the command."""
    return Trainer(**{**arguments, "default_root_dir": str(folder.path), **changes})


def make_judge(arguments: dict[str, Any], folder: RunFolder) -> Trainer:
    """A trainer that only evaluates: the recipe's arguments, without loggers and callbacks."""
    quiet = {"logger": False, "enable_checkpointing": False, "callbacks": []}
    return make_trainer(arguments, folder, **quiet)


def place_loggers(config: Namespace, folder: RunFolder) -> None:
    """Let the loggers of a recipe write into the run folder; W&B keeps one identity on resume."""
    loggers = config.trainer.logger
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        arguments = getattr(logger, "init_args", None)
        if arguments is None:
            continue
        if arguments.get("save_dir") in (None, "."):
            arguments["save_dir"] = str(folder.path)
        if logger.class_path.endswith("WandbLogger"):
            arguments["id"] = arguments.get("id") or folder.tracker_id()
            arguments["name"] = arguments.get("name") or folder.path.name
            logger["dict_kwargs"] = {"resume": "allow", **(logger.get("dict_kwargs") or {})}


def configured_loggers(setting: Any) -> list[Logger]:
    """The loggers that a recipe asks for, besides the CSV one."""
    if isinstance(setting, Logger):
        return [setting]
    return list(setting) if isinstance(setting, list | tuple) else []


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


def evaluate(model: nn.Module, data: VisionData, trainer: Trainer) -> dict[str, Any]:
    """Accuracy of a model on the evaluation images."""
    data.attach(expected_by(model), num_classes_of(model))
    module = Distillation(model, objective=Objective())
    found = trainer.validate(module, datamodule=data, verbose=False)[0]
    items = {name.removeprefix("val/"): value for name, value in found.items()}
    return {**items, "n_images": int(items["n_images"])}


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

"""Arguments that several commands have."""

from argparse import ArgumentTypeError
from typing import Any

import torch
import yaml
from jsonargparse.typing import register_type
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningArgumentParser

from qat.cli.recipe import RecipeFile
from qat.lightning.data import VisionData
from qat.lightning.modules import Distillation
from qat.lightning.tasks import Task
from qat.patchwise import PatchBits

register_type(torch.device)  # a setting of callbacks; else a recipe that is kept would lack it


def add_run_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of every command that runs a recipe."""
    parser.add_argument(
        "--config", action=RecipeFile, help="Recipe; may be given several times, later wins."
    )
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


def axes(value: Any) -> dict[str, Any]:
    """The axes of a grid as plain data: what they name is parsed once it is laid over the recipe.

    Raises:
        ArgumentTypeError: If an axis is no list of recipes, nor recipes and settings by name.
    """
    found = yaml.safe_load(value) if isinstance(value, str) else value
    if not isinstance(found, dict) or not all(map(_is_axis, found.values())):
        raise ArgumentTypeError(
            "a grid is a mapping; each axis is a list of recipe files, or recipe files and "
            "settings by name"
        )
    return found


def _is_axis(axis: Any) -> bool:
    if isinstance(axis, dict):
        return all(isinstance(choice, str | dict) for choice in axis.values())
    return isinstance(axis, list) and all(isinstance(choice, str) for choice in axis)


def add_grid_argument(parser: LightningArgumentParser) -> None:
    """The argument of a command that goes through a grid of recipes."""
    parser.add_argument(
        "--grid",
        type=axes,
        default=None,
        help="Axes of choices, each a list of recipe files or settings by name; every combination "
        "is laid over the recipe and run.",
    )


def add_draws_argument(parser: LightningArgumentParser) -> None:
    """The argument of a command that compares recipes."""
    parser.add_argument("--draws", type=int, default=1, help="Seeds of each choice of the grid.")

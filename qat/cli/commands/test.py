"""`test`: evaluate a checkpoint, or a float model."""

import time

from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser
from torch import nn

from qat import checkpoint as files
from qat.cli.commands.common import (
    add_patchwise_argument,
    add_run_arguments,
    add_training_arguments,
    check_coverage,
    console,
    evaluate,
    make_data,
    make_judge,
    make_module,
    make_task,
    model_items,
    patchwise_as_asked,
    prepare,
    recipe_name,
    run_items,
    show,
    trainer_arguments,
)
from qat.cli.commands.fit import train_judge
from qat.cli.run_folder import RunFolder
from qat.cli.trackers import finish, trackers
from qat.plan import load_plan
from qat.quantizers import Phase, quantizers

HELP = "evaluate a checkpoint, or a float model, on the evaluation images of a recipe"


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `test`: those of `fit`, so that its recipes serve both."""
    add_run_arguments(parser)
    add_training_arguments(parser)
    add_patchwise_argument(parser)


def run(parser: LightningArgumentParser, config: Namespace) -> None:
    """Evaluate, print and write `metrics.json`."""
    started = time.monotonic()
    folder = RunFolder.named(config.run_dir, recipe_name(config))
    if folder.metrics.exists():
        raise ValueError(f"run folder '{folder.path}' already holds a run; choose another")
    prepare(config)
    model = load_model(parser, config)
    data = make_data(parser, config)
    check_coverage(model, config.require_coverage)
    trainer = make_judge(trainer_arguments(parser, config), folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    train_judge(parser, config, folder)
    task = make_task(parser, config)
    with trackers(parser, config, folder) as loggers:
        with patchwise_as_asked(parser, model, config):
            items = {**evaluate(task, model, data, trainer, folder), **model_items(model)}
        of_run = run_items("test", config, started, trainer.strategy.root_device)
        finish(folder, loggers, of_run | items)
    show(items, {**task.rows, "top-5": ("top5", "{:.4f}")})
    console.print(f"run folder: {folder.path}")


def load_model(parser: LightningArgumentParser, config: Namespace) -> nn.Module:
    """The model in the checkpoint; without one, the float model of the recipe.

    Raises:
        ValueError: If the recipe asks for another model than the checkpoint holds, or for a
            quantized one without a checkpoint to take its quantizers' state from.
    """
    settings = config.model
    if config.ckpt_path is None:
        if settings.plan is not None:
            raise ValueError(
                "the recipe has a plan, but without --ckpt_path its quantizers have no state and "
                "the model would run in float; name a checkpoint, or drop model.plan to test the "
                "float model"
            )
        if settings.model is None and settings.teacher is None:
            raise ValueError("nothing to test: set --ckpt_path or model.model")
        return make_module(parser, config).model
    model = files.load(config.ckpt_path)
    idle = [name for name, q in quantizers(model) if q.phase is not Phase.QUANTIZE]
    if idle:
        raise ValueError(
            f"checkpoint '{config.ckpt_path}' is converted but not calibrated: {idle[0]} and "
            f"{len(idle) - 1} others would run in float; calibrate it first"
        )
    _require_same_model(parser, config, model)
    return model


def _require_same_model(
    parser: LightningArgumentParser, config: Namespace, model: nn.Module
) -> None:
    """Refuse a checkpoint that contradicts what the recipe says of model and plan."""
    settings = config.model
    if settings.plan is not None:
        wanted = load_plan(settings.plan).to_list()
        conversion = getattr(model, "conversion", None)
        found = None if conversion is None else conversion.plan.to_list()
        if wanted != found:
            holds = "a float model" if found is None else "one with another plan"
            raise ValueError(
                f"the recipe has a plan, but checkpoint '{config.ckpt_path}' holds {holds}; name "
                "the checkpoint that this recipe trained, or its own recipe"
            )
    if settings.model is not None:
        settings.plan = settings.teacher = None
        settings.objective = parser.get_defaults().model.objective
        recipe = make_module(parser, config).model.recipe
        if recipe != model.recipe:
            raise ValueError(
                f"the recipe builds {recipe}, but checkpoint '{config.ckpt_path}' holds "
                f"{model.recipe}; name the checkpoint that this recipe trained"
            )

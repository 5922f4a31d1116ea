"""`plan`: a dry run that says what a recipe would quantize and what that costs."""

from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser
from torch import nn

from qat import checkpoint as files
from qat.cli.commands.common import (
    add_run_arguments,
    add_training_arguments,
    check_coverage,
    console,
    make_module,
)
from qat.cli.grid import add_grid_argument, choices, overlay
from qat.cli.recipe import load_recipe
from qat.cost.count import Cost, activation_bytes, cost
from qat.cost.coverage import claim_lines, plan_table, totals_table

HELP = "print every layer, its bits, and predicted bytes, operations and memory; touches no data"


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `plan`: those of `fit`, so that its recipes serve both."""
    add_run_arguments(parser)
    add_training_arguments(parser)
    add_grid_argument(parser)


def run(parser: LightningArgumentParser, config: Namespace) -> None:
    """Print the tables; for a grid, those of every choice that differs from the ones before."""
    if config.grid is None:
        show(config, build(parser, config))
        return
    shown: list[Cost] = []
    for names, paths in choices(config.grid):
        chosen = overlay(parser, config, paths, config.seed_everything)
        model = build(parser, chosen)
        if (costs := cost(model)) not in shown:
            shown.append(costs)
            console.rule(" ".join(names.values()))
            show(chosen, model)


def show(config: Namespace, model: nn.Module) -> None:
    """Print the tables of one model."""
    costs = cost(model)
    float_model = files.build_model(model.recipe)  # type: ignore[arg-type]
    console.print(plan_table(costs))
    check_coverage(model, config.require_coverage)
    console.print(totals_table(costs, cost(float_model)))
    for line in memory_lines(model, costs, config.data.batch_size):
        console.print(line)
    for line in claim_lines(str(model.recipe.get("name")), costs):  # type: ignore[union-attr]
        console.print(line, highlight=False)


def build(parser: LightningArgumentParser, config: Namespace) -> nn.Module:
    """The converted model of a recipe, without its teacher and its data."""
    if config.ckpt_path is not None:
        return files.load(config.ckpt_path)
    settings = config.model
    if settings.model is None and settings.teacher is None and config.teacher_config:
        recipe = load_recipe(config.teacher_config)
        settings.model = Namespace(**recipe["model"]["model"])
    settings.objective = parser.get_defaults().model.objective
    return make_module(parser, config).model


def memory_lines(model: nn.Module, costs: Cost, batch_size: int) -> list[str]:
    """Predicted peak memory of training in float32 with an Adam optimizer."""
    image = activation_bytes(model)
    state = 16 * costs.num_parameters
    total = state + batch_size * image
    return [
        f"training memory at batch {batch_size}: about {total / 2**20:,.0f} MiB = "
        f"{state / 2**20:,.0f} for weights, gradients and two Adam moments, "
        f"{image / 2**20:,.1f} of activations an image; teacher and workspace come on top"
    ]

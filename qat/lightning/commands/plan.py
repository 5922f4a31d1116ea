"""`plan`: a dry run that says what a recipe would quantize and what that costs."""

from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser
from torch import nn

from qat import checkpoint as files
from qat.lightning.commands.adapt import add_adaptation_arguments
from qat.lightning.commands.common import (
    add_run_arguments,
    add_training_arguments,
    check_coverage,
    console,
    make_module,
)
from qat.lightning.recipe import load_recipe
from qat.models import timm_model
from qat.report import claim_lines, plan_table, totals_table
from qat.search.cost import Cost, activation_bytes, cost

HELP = "print every layer, its bits, and predicted bytes, operations and memory; touches no data"


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `plan`: those of `fit` and `adapt`, so that their recipes serve it too."""
    add_run_arguments(parser)
    add_training_arguments(parser)
    add_adaptation_arguments(parser)


def run(parser: LightningArgumentParser, config: Namespace) -> None:
    """Print the tables."""
    model = build(parser, config)
    costs = cost(model)
    float_model = timm_model(**model.recipe)  # type: ignore[arg-type]
    console.print(plan_table(costs))
    check_coverage(model, config.require_coverage)
    console.print(totals_table(costs, cost(float_model)))
    for line in memory_lines(model, costs, config.data.batch_size):
        console.print(line)
    for line in claim_lines(str(model.recipe["name"]), costs):  # type: ignore[index]
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

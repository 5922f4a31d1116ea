"""`plan`: a dry run that says what a recipe would quantize and what that costs."""

from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser
from torch import nn

from qat import checkpoint as files
from qat.card import amend, card_of
from qat.cli.arguments import add_grid_argument, add_run_arguments, add_training_arguments
from qat.cli.console import check_coverage, console
from qat.cli.grid import choices
from qat.cli.recipe import load_recipe
from qat.cli.session import Session
from qat.cli.start import from_checkpoint, is_quantized
from qat.cost.count import Cost, activation_bytes, cost
from qat.cost.coverage import claim_lines, plan_table, totals_table
from qat.export.pack import packed_bytes


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `plan`: those of `fit`, so that its recipes serve both."""
    add_run_arguments(parser)
    add_training_arguments(parser)
    add_grid_argument(parser)


def run(session: Session) -> None:
    """Print the tables; for a grid, those of every choice that differs from the ones before."""
    if session.config.grid is None:
        show(session, build(session))
        return
    shown: list[Cost] = []
    for names, recipe in choices(session.config.grid):
        chosen = session.overlaid(recipe)
        model = build(chosen)
        if (costs := cost(model)) not in shown:
            shown.append(costs)
            console.rule(" ".join(names.values()))
            show(chosen, model)


def show(session: Session, model: nn.Module) -> None:
    """Print the tables of one model."""
    costs = cost(model)
    recipe = card_of(model).recipe or {}
    float_model = files.build_model(recipe)
    console.print(plan_table(costs))
    check_coverage(model, session.config.require_coverage)
    console.print(totals_table(costs, cost(float_model)))
    for line in memory_lines(model, costs, session.config.data.batch_size):
        console.print(line)
    for line in claim_lines(str(recipe.get("name")), costs):
        console.print(line, highlight=False)
    if session.config.ckpt_path is None:
        amend(model, start=None)  # once it is trained
    console.print(packed_line(model), highlight=False)


def build(session: Session) -> nn.Module:
    """The converted model of a recipe, without its teacher and its data."""
    config = session.config
    if (path := config.ckpt_path) is not None:
        as_it_is = config.model.plan is None or is_quantized(path)
        return files.load(path) if as_it_is else from_checkpoint(session).model()
    if config.model.model is None and config.model.teacher is None and config.teacher_config:
        recipe = load_recipe(config.teacher_config)  # the student will be a copy of this model
        session = session.changed({"model.model": Namespace(**recipe["model"]["model"])})
    return session.model()


def packed_line(model: nn.Module) -> str:
    """Bytes of the packed file that `export` would write, to the last one; or why there is none."""
    try:
        size = packed_bytes(model)
    except ValueError as error:
        return f"no packed file: {error}"
    names = "" if card_of(model).class_names else ", before names of classes"
    return f"packed file: {size:,} bytes, its header included{names}"


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

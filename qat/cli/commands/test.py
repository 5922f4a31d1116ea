"""`test`: evaluate a checkpoint, an exported file, or a float model."""

from pytorch_lightning.cli import LightningArgumentParser
from torch import nn

from qat.cli.arguments import add_patchwise_argument, add_run_arguments, add_training_arguments
from qat.cli.console import check_coverage, console, say_untrained, show
from qat.cli.evaluation import evaluate, patchwise_as_asked
from qat.cli.session import Session, in_run_folder
from qat.cli.start import loaded, model_in
from qat.cli.trackers import finish, trackers
from qat.cli.training import with_judge


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `test`: those of `fit`, so that its recipes serve both."""
    add_run_arguments(parser)
    add_training_arguments(parser)
    add_patchwise_argument(parser)


@in_run_folder
def run(session: Session) -> None:
    """Evaluate, print and write `metrics.json`."""
    session.require_new()
    session.prepare()
    model = load_model(session)
    data = session.data()
    check_coverage(model, session.config.require_coverage)
    say_untrained(model)
    evaluator = session.evaluator()
    session = with_judge(session)
    with trackers(session) as loggers:
        with patchwise_as_asked(session, model):
            items = evaluate(session, model, data, evaluator)
        finish(session.folder, loggers, session.items(evaluator.strategy.root_device) | items)
    show(items, {**session.task().rows, "top-5": ("top5", "{:.4f}")})
    console.print(f"run folder: {session.folder.path}")


def load_model(session: Session) -> nn.Module:
    """The model in the checkpoint; without one, the float model of the recipe.

    Raises:
        ValueError: If the recipe asks for a quantized model, without a checkpoint to take its
            quantizers' state from, or for another model than the checkpoint holds.
    """
    settings, path = session.config.model, session.config.ckpt_path
    if path is None:
        if settings.plan is not None:
            raise ValueError(
                "the recipe has a plan, but without --ckpt_path its quantizers have no state and "
                "the model would run in float; name a checkpoint, or drop model.plan to test the "
                "float model"
            )
        if settings.model is None and settings.teacher is None:
            raise ValueError("nothing to test: set --ckpt_path or model.model")
        return session.module().model
    return loaded(session, model_in)

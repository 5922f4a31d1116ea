"""`export`: a file that runs elsewhere, checked against the model it came from."""

from typing import Literal

from pytorch_lightning.cli import LightningArgumentParser

from qat import checkpoint as files
from qat.cli.arguments import add_run_arguments, add_training_arguments
from qat.cli.console import check_coverage, console, show
from qat.cli.evaluation import model_items
from qat.cli.packing import NAME, ROWS, check, evaluation_images, first, pack
from qat.cli.session import Session
from qat.cli.start import loaded
from qat.cli.trackers import finish, trackers
from qat.export.verify import Verification


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `export`: those of `fit`, so that its recipes serve both."""
    add_run_arguments(parser)
    add_training_arguments(parser)
    parser.add_argument(
        "--format", type=Literal["packed"], default="packed", help="Form of the file."
    )
    parser.add_argument(
        "--half",
        type=bool,
        default=False,
        help="Keep what are no codes in 16 bits; changes the model a little, as the gap says.",
    )
    parser.add_argument(
        "--verify",
        type=int | None,
        nargs="?",
        const=0,
        default=None,
        help="Compare with the simulated model on this many images, without a number on all: those "
        "the recipe evaluates, or those below --images DIR.",
    )


def run(session: Session) -> None:
    """Write the file, compare, print and write `metrics.json`.

    Raises:
        ValueError: If there is no checkpoint, or the file's model differs from it.
    """
    config, folder = session.config, session.folder.path
    if config.ckpt_path is None:
        raise ValueError("nothing to export: name a checkpoint with --ckpt_path")
    session.require_new()
    session.prepare()
    model = loaded(session)
    check_coverage(model, config.require_coverage)
    asked = config.verify is not None
    batches = list(first(evaluation_images(session, model), config.verify)) if asked else []
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    items = {**model_items(model), **pack(model, path, half=config.half)}
    items["size_bytes"] = items["size_packed_bytes"]
    session.keep_recipe()
    found = Verification()
    if batches:
        found = check(files.load(path) if config.half else model, path, batches)
        items |= found.items()
    if batches and config.half:
        rounded = check(model, path, batches)
        items |= {"logit_gap_half": max(rounded.gaps), "agreement_half": rounded.agreement}
    with trackers(session) as loggers:
        finish(session.folder, loggers, session.items("cpu") | items)
    show(items, ROWS)
    console.print(f"packed file: {path}")
    found.require_same()

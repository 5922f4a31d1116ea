"""`export`: a file that runs elsewhere, checked against the model it came from."""

from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.cli import LightningArgumentParser
from torch import nn

from qat import checkpoint as files
from qat.calibrate import Batch
from qat.cli import onnx_files, packed_files
from qat.cli.arguments import add_run_arguments, add_training_arguments
from qat.cli.console import check_coverage, console, show
from qat.cli.evaluation import model_items
from qat.cli.inputs import evaluation_inputs, first
from qat.cli.session import Session
from qat.cli.start import loaded
from qat.cli.trackers import finish, trackers
from qat.export.verify import Verification

ROWS = {**onnx_files.ROWS, **packed_files.ROWS}


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `export`: those of `fit`, so that its recipes serve both."""
    add_run_arguments(parser)
    add_training_arguments(parser)
    parser.add_argument(
        "--format",
        type=Literal["packed", "onnx"],
        default="packed",
        help="Form of the file: packed, for this program's runtime, or ONNX.",
    )
    parser.add_argument(
        "--half",
        type=bool,
        default=False,
        help="Keep what are no codes of a packed file in 16 bits; changes the model a little, as "
        "the gap says.",
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
    if config.half and config.format != "packed":
        raise ValueError("--half is for packed files; leave it out, or take --format packed")
    session.require_new()
    session.prepare()
    model = loaded(session)
    check_coverage(model, config.require_coverage)
    asked = config.verify is not None
    batches = list(first(evaluation_inputs(session, model), config.verify)) if asked else []
    folder.mkdir(parents=True, exist_ok=True)
    export = packed if config.format == "packed" else onnx
    path, items, found = export(session, model, batches)
    with trackers(session) as loggers:
        finish(session.folder, loggers, session.items("cpu") | items)
    show(items, ROWS)
    console.print(f"{config.format} file: {path}")
    found.require_same()


Exported = tuple[Path, dict[str, Any], Verification]
"""The file, what `metrics.json` holds of it, and how it compares."""


def packed(session: Session, model: nn.Module, batches: list[Batch]) -> Exported:
    """Write and compare a packed file."""
    half, path = session.config.half, session.folder.path / packed_files.NAME
    items = {**model_items(model), **packed_files.write(model, path, half=half)}
    items["size_bytes"] = items["size_packed_bytes"]
    session.keep_recipe()
    found = Verification()
    if batches:
        found = packed_files.check(files.load(path) if half else model, path, batches)
        items |= found.items()
    if batches and half:
        rounded = packed_files.check(model, path, batches)
        items |= {"logit_gap_half": max(rounded.gaps), "agreement_half": rounded.agreement}
    return path, items, found


def onnx(session: Session, model: nn.Module, batches: list[Batch]) -> Exported:
    """Write and compare an ONNX file."""
    path = session.folder.path / onnx_files.NAME
    items = {**model_items(model), **onnx_files.write(model, path)}
    items["size_bytes"] = items["size_onnx_bytes"]
    session.keep_recipe()
    if not batches:
        return path, items, Verification()
    found, compared = onnx_files.check(model, path, batches)
    return path, items | compared, found

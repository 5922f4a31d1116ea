"""`fit`: teacher training, distillation, quantization-aware training, binarization."""

from typing import Literal

from pytorch_lightning.cli import LightningArgumentParser
from rich.table import Table

from qat import checkpoint as files
from qat.cli import packed_files
from qat.cli.arguments import add_run_arguments, add_training_arguments
from qat.cli.console import console, show
from qat.cli.inputs import evaluation_inputs
from qat.cli.run_folder import RunFolder, is_first_process
from qat.cli.session import Session, in_run_folder
from qat.cli.training import Watching, train


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `fit`."""
    add_run_arguments(parser)
    add_training_arguments(parser)
    parser.add_class_arguments(Watching, "doctor", instantiate=False)
    parser.add_argument(
        "--export",
        type=Literal["packed"] | None,
        default=None,
        help="Write the trained model as a packed file as well, and compare it.",
    )


@in_run_folder
def run(session: Session) -> None:
    """Train as the recipe says, evaluate, and print the comparison with the teacher."""
    train(session)
    if is_first_process():
        console.print(comparison_table(session.folder))
        if session.config.export is not None:
            export(session)
    console.print(f"run folder: {session.folder.path}")


def export(session: Session) -> None:
    """Write the trained model as a packed file, and add what that saves to `metrics.json`.

    Raises:
        ValueError: If it cannot be packed, or differs from the trained model.
    """
    folder = session.folder
    model, path = files.load(folder.last), folder.path / packed_files.NAME
    saved = packed_files.write(model, path)
    found = packed_files.check(model, path, evaluation_inputs(session, model))
    compared = {f"{key}_packed": value for key, value in found.items().items()}
    folder.write_metrics({**folder.read_metrics(), **saved, **compared})
    show({**saved, **found.items()}, packed_files.ROWS, "Packed file")
    console.print(f"packed file: {path}")
    found.require_same()


def comparison_table(folder: RunFolder) -> Table:
    """The trained model beside its teacher, from what both runs wrote down."""
    table = Table(title="Result", title_justify="left")
    items = folder.read_metrics()
    columns = (
        {"model": ""} if "top1_teacher" not in items else {"teacher": "_teacher", "student": ""}
    )
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    rows = {
        "top-1": ("top1", "{:.4f}"),
        "noise error": ("noise_error", "{:.5f}"),
        "class accuracy of samples": ("class_accuracy", "{:.4f}"),
        "evaluation images": ("n_images", "{:,}"),
        "of these refused": ("n_refused", "{:,}"),
        "training images left out": ("n_refused_train", "{:,}"),
        "parameters": ("num_parameters", "{:,}"),
        "bytes (weights at their bits, all else at 32)": ("size_bytes", "{:,.0f}"),
        "MACs below 16 bits": ("coverage_macs", "{:.2%}"),
        "BOPs (MACs x bits x bits)": ("bops", "{:,}"),
        "OPs (FLOPs + BOPs/64)": ("ops", "{:,.0f}"),
        "flip rate, mean over training": ("flip_rate", "{:.6f}"),
        "flip rate, at 80 to 90 % of it": ("flip_rate_late", "{:.6f}"),
        "weights that changed code": ("changed", "{:.4f}"),
        "sign entropy, bits": ("sign_entropy", "{:.4f}"),
        "dead channels": ("dead_channels", "{:.4f}"),
        "seconds, teacher included": ("seconds", "{:.1f}"),
    }
    for label, (key, form) in rows.items():
        keys = [key + suffix for suffix in columns.values()]
        values = [form.format(items[k]) if k in items else "-" for k in keys]
        if any(value != "-" for value in values):
            table.add_row(label, *values)
    return table

"""`reproduce`: run a row of the ledger again, and say whether its number still holds."""

import shlex

from pytorch_lightning.cli import LightningArgumentParser

from qat.cli import ledger
from qat.cli.console import console
from qat.cli.main import main
from qat.cli.run_folder import RunFolder
from qat.cli.session import Session


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `reproduce`."""
    parser.add_argument("name", type=str, help="Name of the row, see benchmarks/ledger.yaml.")
    parser.add_argument("--run_dir", type=str | None, default=None, help="Folder of the run.")
    parser.add_argument("--seed_everything", type=int, default=0, help="Seed of everything.")
    parser.add_argument(
        "--record", type=bool, default=False, help="Add the run to docs/results/ledger.jsonl."
    )


def run(session: Session) -> None:
    """Run the row's commands inside the run folder, and compare what the last one gives.

    Raises:
        ValueError: If a command fails, or the number lies outside its band.
    """
    session.require_new()
    question, row = ledger.row_named(session.config.name, ledger.questions())
    inner = RunFolder(session.folder.path / "run")
    here = shlex.quote(str(session.folder.path))
    *before, last = row.command.replace("runs/", f"{here}/").split(" && ")
    for command in (*before, f"{last} --run_dir {here}/run"):
        status = main([*shlex.split(command), "--seed_everything", str(session.seed)])
        if status:
            raise ValueError(f"'{command}' ended with status {status}")
    metrics = inner.read_metrics()
    if session.config.record:
        ledger.record(row, question, metrics)
    known, value = ledger.expected(row, ledger.runs()), metrics[row.measure]
    said = f"{row.measure} {value:.4f}, expected {known.value:.4f} within {known.band:.4f}"
    inside = known.holds(value)
    items = {"name": row.name, "value": value, "expected": known.value, "band": known.band}
    device = metrics["device"]
    session.folder.write_metrics({**session.items(device), **items, "inside": inside})
    if not inside:
        raise ValueError(f"'{row.name}' lies outside its band: {said}")
    console.print(f"{row.name} lies inside its band: {said}", highlight=False)

"""`report`: one HTML page that shows what runs left in their folders."""

from pathlib import Path

from pytorch_lightning.cli import LightningArgumentParser

from qat import disk
from qat.cli.console import console
from qat.cli.report.page import page
from qat.cli.report.run import Run
from qat.cli.report.wording import size
from qat.cli.session import Session

NAME = "report.html"


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `report`."""
    parser.add_argument("runs", type=str, nargs="*", help="Folders of runs, the first one first.")
    parser.add_argument(
        "--output", type=str | None, default=None,
        help="The file; report.html in the first folder by default.",
    )  # fmt: skip


def run(session: Session) -> None:
    """Read the runs, and write the page.

    Raises:
        ValueError: If no run is named, or a folder holds none, or its results are damaged.
    """
    config = session.config
    if not config.runs:
        raise ValueError("no run to report on; name folders of runs, such as report runs/default")
    runs = [Run.read(path) for path in dict.fromkeys(config.runs)]
    path = Path(config.output or runs[0].folder.path / NAME)
    content = page(runs).encode()
    disk.write(path, content)
    console.print(f"report: {path} ({size(len(content))})", highlight=False, soft_wrap=True)

"""The command line: parses, dispatches, and turns a user's mistake into one clear line.

Nothing heavy is imported before a command is known, so that help is quick.
"""

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import qat
from qat.cli.causes import cause
from qat.cli.kept import with_kept_recipe
from qat.cli.mistakes import told
from qat.cli.processes import Processes, processes_in
from qat.cli.shorthand import spelled_out
from qat.cli.words import of_trainer, require_once, with_save_dir
from qat.plan import nearest

COMMANDS = {
    "fit": "train: a teacher, a quantized or a binary model, with or without distillation",
    "test": "evaluate a checkpoint, or a float model, on the evaluation images of a recipe",
    "quantize": "quantize a trained model on a few images without labels, compare it with float, "
    "save it",
    "search": "choose the bits of every component under a budget; writes a plan for fit and "
    "quantize",
    "adapt": "adapt a model to a stream of corrupted images, and compare it with the model left "
    "alone",
    "export": "write a packed file that runs without torch, or an ONNX file, and compare it with "
    "the model",
    "predict": "name the classes of images without labels, by a checkpoint or an exported file",
    "plan": "print every layer, its bits, and predicted bytes, operations and memory; touches no "
    "data",
    "report": "write one HTML page with the results, curves and pictures of runs, side by side",
    "reproduce": "run a row of the ledger of results again, and say whether its number still holds",
}
"""What each command does; the module of its name in `qat.cli.commands` says how."""
IN_ONE_PROCESS = COMMANDS.keys() - {"fit", "plan"}
"""Commands that leave further processes and devices of a recipe aside."""
FAILED, UNUSABLE = 1, 2
"""Status of a run that fails, and of arguments that cannot be used."""
COMMAND, RECIPE = "fit", "default"
PROGRAM = "lowbit-vit" if Path(sys.argv[0]).stem == "lowbit-vit" else "train.py"
DESCRIPTION = f"Low-bit vision transformers. Without a command: {COMMAND} --config {RECIPE}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words of the command line; None takes those of the process. Without a command it
            is `fit`, and without a recipe as well the default one.

    Returns:
        The exit status: 0, 1 where the run failed, 2 for unusable arguments, 130 if interrupted.
    """
    name, *words = _with_command(list(sys.argv[1:] if arguments is None else arguments))
    if name == "--version":
        print(f"lowbit-vit {qat.__version__}")
        return 0
    if name not in COMMANDS:
        return _no_command(name)
    status, parser = UNUSABLE, None
    try:
        _let_recipes_find_modules()
        here = replace(processes_in(os.environ), alone=name in IN_ONE_PROCESS)
        _tell_rank(here)
        _quieten()
        parser = make_parser(name)
        require_once(words)
        words = with_kept_recipe(spelled_out(name, words))
        config = parser.parse_args(with_save_dir(words))
        status = FAILED
        _run(name, parser, config, words, here)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # of any library; a user gets one line, whoever raised it
        return _fail(error, parser, status)
    return 0


def _let_recipes_find_modules() -> None:
    """Let a recipe name modules of the working folder; they come last, so they hide no others."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)


def _run(name: str, parser: Any, config: Any, words: list[str], here: Processes) -> None:
    """Run a command; those that take one process leave the others nothing to do."""
    from qat.cli.session import Session

    session = Session.begin(name, parser, config, of_trainer(words), here)
    if here.first or not here.alone:
        import_module(f"qat.cli.commands.{name}").run(session)


def open_session(name: str, *words: str) -> Any:
    """The `Session` of a command, for programs that take apart what a recipe builds."""
    from qat.cli.session import Session

    parser = make_parser(name)
    return Session.begin(name, parser, parser.parse_args(spelled_out(name, list(words))))


def make_parser(name: str) -> Any:
    """The parser of a command."""
    from pytorch_lightning.cli import LightningArgumentParser

    parser = LightningArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=COMMANDS[name],
        exit_on_error=False,
        allow_abbrev=False,
    )
    import_module(f"qat.cli.commands.{name}").add_arguments(parser)
    return parser


def _with_command(words: list[str]) -> list[str]:
    """The words, with the default command where they name none, and its recipe likewise."""
    if words and (words[0] in ("-h", "--help", "--version") or not words[0].startswith("-")):
        return words
    has_recipe = any(word.partition("=")[0] == "--config" for word in words)
    return [COMMAND, *([] if has_recipe else ["--config", RECIPE]), *words]


def _no_command(word: str) -> int:
    """Print the help that was asked for, or say that there is no such command."""
    if not word.startswith("-"):
        said = f"there is no command '{word}'{nearest(word, COMMANDS)}"
        return _fail(ValueError(said), None, UNUSABLE)
    parser = argparse.ArgumentParser(PROGRAM, description=DESCRIPTION)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(metavar="command", title="commands")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    parser.parse_args([word])
    return 0


def _fail(error: Exception, parser: Any, status: int) -> int:
    """Say what went wrong, in one line; after the traceback where `LOWBIT_DEBUG` asks for it."""
    if os.environ.get("LOWBIT_DEBUG"):
        traceback.print_exception(error)
    message = cause(error) if parser is None else told(error, parser)
    print(f"error: {' '.join(message.split())[:700]}", file=sys.stderr)
    return status


def _tell_rank(here: Processes) -> None:
    """Say to Lightning which process this is; by itself it believes any variable of that sort."""
    from pytorch_lightning.utilities import rank_zero_only

    rank_zero_only.rank = 0 if here.first else 1  # type: ignore[attr-defined]


def _quieten() -> None:
    """Silence what Lightning says about things that are meant to be so; a warning is one line."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import pytorch_lightning  # noqa: F401 - its import sets levels and the form of warnings

    warnings.formatwarning = lambda message, *_: f"warning: {' '.join(str(message).split())}\n"
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*Experiment logs directory.*exists and is not empty.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*You're resuming from a checkpoint that ended before the epoch ended.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*module\\(s\\) in eval mode at the start of training.*",  # train mode is set after it
        ".*treespec, LeafSpec.*",  # Lightning 2.6 with torch 2.15
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", module="PIL")  # of odd pictures; it reads or refuses them


if __name__ == "__main__":
    sys.exit(main())

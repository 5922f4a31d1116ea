"""The command line: parses, dispatches, and turns a user's mistake into one clear line."""

import difflib
import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from functools import cache
from inspect import Parameter, isabstract, signature
from typing import Any, get_args

import pytorch_lightning.callbacks
import pytorch_lightning.loggers
from pytorch_lightning.cli import LightningArgumentParser

from qat.cli.commands import adapt, fit, plan, quantize, search, test
from qat.cli.recipe import RecipeFile
from qat.plan import nearest

COMMANDS: dict[str, Any] = {
    "fit": fit,
    "test": test,
    "quantize": quantize,
    "search": search,
    "adapt": adapt,
    "plan": plan,
}
COMMAND, RECIPE = "fit", "configs/default.yaml"
DESCRIPTION = f"Low-bit vision transformers. Without a command: {COMMAND} --config {RECIPE}"


@cache
def make_parser() -> tuple[LightningArgumentParser, dict[str, LightningArgumentParser]]:
    """The parser of the program, and that of each command; made once a process."""
    options: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
    parser = LightningArgumentParser(prog="train.py", description=DESCRIPTION, **options)
    commands = parser.add_subcommands(dest="command")
    parsers = {}
    for name, command in COMMANDS.items():
        parsers[name] = LightningArgumentParser(description=command.HELP, **options)
        parsers[name].add_argument(
            "--config", action=RecipeFile, help="Recipe; may be given several times, later wins."
        )
        command.add_arguments(parsers[name])
        commands.add_subcommand(name, parsers[name], help=command.HELP)
    keys = {
        name: {action.dest.split(".")[0] for action in command._actions}
        for name, command in parsers.items()
    }
    for name, command in parsers.items():
        command.keys_of_other_commands = set().union(*keys.values()) - keys[name]
    return parser, parsers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words of the command line; None takes those of the process. Without a command it
            is `fit`, and without a recipe as well the default one.

    Returns:
        The exit status: 0, 1 where the run failed, 2 for unusable arguments, 130 if interrupted.
    """
    _quieten()
    words = _with_command(list(sys.argv[1:] if arguments is None else arguments))
    parser, parsers = make_parser()
    try:
        config = parser.parse_args(_with_save_dir(words))
    except (ArgumentError, TypeError) as error:
        told = _plain(str(error), parsers.get(words[0]))
        return _fail(f"{told}{_nearest_option(str(error), words, parsers)}", 2)
    try:
        COMMANDS[config.command].run(parsers[config.command], config[config.command])
    except (ValueError, ArgumentError) as error:  # the latter from the recipe of a teacher
        return _fail(_plain(str(error), parsers[config.command]), 1)
    except KeyboardInterrupt:
        return 130
    return 0


def _with_command(words: list[str]) -> list[str]:
    """The words, with the default command where they name none, and its recipe likewise."""
    if words and (words[0] in ("-h", "--help") or not words[0].startswith("-")):
        return words
    has_recipe = any(word.partition("=")[0] == "--config" for word in words)
    return [COMMAND, *([] if has_recipe else ["--config", RECIPE]), *words]


def _with_save_dir(words: list[str]) -> list[str]:
    """Spare the user the folder of a logger that insists on one: it is the run folder."""
    if "--trainer.logger" not in words[:-1]:
        return words
    name = words[words.index("--trainer.logger") + 1].rpartition(".")[2]
    logger = getattr(pytorch_lightning.loggers, name, None)
    folder = signature(logger).parameters.get("save_dir") if logger is not None else None
    if folder is None or folder.default is not Parameter.empty or "save_dir" in "".join(words):
        return words
    return [*words, "--trainer.logger.save_dir", "."]


def _nearest_option(
    message: str, words: list[str], parsers: dict[str, LightningArgumentParser]
) -> str:
    """A suggestion for the unknown option that an error message names."""
    found = re.search(r"(?:arguments: --|option ')([\w.]+)", message)
    if not found or words[0] not in parsers:
        return ""
    # An option of a component that is named by class_path is known to that component only.
    known = [action.dest for action in parsers[words[0]]._actions if action.dest]
    return nearest(found[1], known) if difflib.get_close_matches(found[1], known) else ""


def _plain(message: str, parser: LightningArgumentParser | None) -> str:
    """A message without the alternatives of an optional value or the type of a missing class."""
    if unknown := _unknown_class(message, parser):
        return unknown
    optional = (
        r"(?:Parser key \"([\w.]+)\":\s+)?Does not validate against any of the Union subtypes\s"
        r".*?Errors:\s+- (.*?)\s+- Expected a <class 'NoneType'>\s.*?Given value: (.*)"
    )
    if found := re.search(optional, message, re.DOTALL):
        key, error, value = found.groups()
        error = f"{error}. Got value: {value}" if error.startswith("Expected a") else error
        message = f'Parser key "{key}": {error}' if key else error
    return message


def _unknown_class(message: str, parser: LightningArgumentParser | None) -> str | None:
    """What to say where a message is about a class that there is none of; None elsewhere."""
    path = r"key \"([\w.]+)\".*module '([\w.]+)' has no attribute '(\w+)'"
    if found := re.search(path, message, re.DOTALL):
        key, module, name = found.groups()
        known = [known for known in vars(sys.modules[module]) if known[0].isupper()]
        return f"{key}: '{module}' has no '{name}'{nearest(name, known)}"
    found = re.search(
        r".*key \"([\w.]+)\".*?Expected a dot import path string: (\w+)\s", message + " ", re.DOTALL
    )
    if not found or parser is None:
        return None
    key, name = found.groups()
    types = [getattr(action, "_typehint", None) for action in parser._actions if action.dest == key]
    known = {known for base in types for known in _names_of_subclasses(base)}
    hint = nearest(name, known) if known else "; give its path, such as module.name"
    return f"{key}: nothing is called '{name}'{hint}"


def _names_of_subclasses(kind: Any) -> Iterator[str]:
    """Names of classes that a type admits, of those known so far."""
    if isinstance(kind, type) and kind.__module__ not in ("builtins", "types"):
        for known in kind.__subclasses__():
            yield from _names_of_subclasses(known)
        concrete = not isabstract(kind) and not getattr(kind, "_is_protocol", False)
        if concrete and kind.__name__[0] != "_":
            yield kind.__name__
    for part in get_args(kind):
        yield from _names_of_subclasses(part)


def _fail(message: str, status: int) -> int:
    line = " ".join(message.split())
    print(f"error: {line[:700]}", file=sys.stderr)
    return status


def _quieten() -> None:
    """Silence what Lightning says about things that are meant to be so."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
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

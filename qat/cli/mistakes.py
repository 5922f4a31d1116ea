"""A user's mistake as one clear line, from what the parser says of it."""

import difflib
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from inspect import isabstract, isfunction
from typing import Any, get_args

from qat.cli.causes import cause
from qat.plan import nearest

MISSING = {
    "data.val": "there are no images: give --images DIR (photos without labels), --data DIR "
    "(photos in a folder for each class), a recipe that has images (--config), or a run "
    "(--ckpt_path)",
    "name": "name a row of benchmarks/ledger.yaml, such as lsq_digits",
}
"""What to say where an argument is missing."""


def told(error: Exception, parser: Any) -> str:
    """What to say of an exception, be it of the parser, ours or of a library.

    Args:
        error: The exception.
        parser: The parser of the command.
    """
    if not isinstance(error, ArgumentError | ValueError):
        return cause(error)
    message = str(error)
    message = re.sub(r"Group '([\w.]+)' does not accept option '", r"unknown option '\1.", message)
    plain = _plain(message, parser).strip()
    if not plain or plain.endswith(":"):  # of a library's assertion without a text
        return f"{plain} {cause(_first(error))}".strip()
    return plain + _nearest_option(message, parser)


def _first(error: BaseException) -> BaseException:
    """The exception that an exception was made from, at the beginning of the chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _nearest_option(message: str, parser: Any) -> str:
    """A suggestion for the unknown option that an error message names."""
    found = re.search(r"(?:arguments: --|option ')([\w.]+)", message)
    if not found:
        return ""
    # An option of a component that is named by class_path is known to that component only.
    known = [action.dest for action in parser._actions if action.dest]
    return nearest(found[1], known) if difflib.get_close_matches(found[1], known) else ""


def _plain(message: str, parser: Any) -> str:
    """A message without the alternatives of an optional value or the type of a missing class."""
    if unknown := _unknown_class(message, parser):
        return unknown
    if found := re.fullmatch(r"the following arguments are required: ([\w.]+)", message):
        return MISSING.get(found[1], message)
    optional = (
        r"(?:Parser key \"([\w.]+)\":\s+)?Does not validate against any of the Union subtypes\s"
        r".*?Errors:\s+- (.*?)\s+- Expected a <class 'NoneType'>\s.*?Given value: (.*)"
    )
    if found := re.search(optional, message, re.DOTALL):
        key, error, value = found.groups()
        error = f"{error}. Got value: {value}" if error.startswith("Expected a") else error
        message = f'Parser key "{key}": {error}' if key else error
    return message


def _unknown_class(message: str, parser: Any) -> str | None:
    """What to say where a message is about a class that there is none of; None elsewhere."""
    path = r"key \"([\w.]+)\".*module '([\w.]+)' has no attribute '(\w+)'"
    if found := re.search(path, message, re.DOTALL):
        key, module, name = found.groups()
        known = [known for known in vars(sys.modules[module]) if known[0].isupper()]
        return f"{key}: '{module}' has no '{name}'{nearest(name, known)}"
    found = re.search(
        r".*key \"([\w.]+)\".*?Expected a dot import path string: (\w+)\s", message + " ", re.DOTALL
    )
    if not found:
        return None
    key, name = found.groups()
    types = [getattr(action, "_typehint", None) for action in parser._actions if action.dest == key]
    known = {known for base in types for known in _names_of_subclasses(base)}
    hint = nearest(name, known) if known else "; give its path, such as module.name"
    return f"{key}: nothing is called '{name}'{hint}"


def _names_of_makers(kind: type) -> Iterator[str]:
    """Paths of the functions beside a class that make one."""
    for name, made in vars(sys.modules[kind.__module__]).items():
        if isfunction(made) and made.__annotations__.get("return") is kind and name[0] != "_":
            yield f"{kind.__module__}.{name}"


def _names_of_subclasses(kind: Any) -> Iterator[str]:
    """Names of classes that a type admits, of those known so far."""
    if isinstance(kind, type) and kind.__module__ not in ("builtins", "types"):
        for known in kind.__subclasses__():
            yield from _names_of_subclasses(known)
        concrete = not isabstract(kind) and not getattr(kind, "_is_protocol", False)
        if concrete and kind.__name__[0] != "_":
            yield kind.__name__
        yield from _names_of_makers(kind)
    for part in get_args(kind):
        yield from _names_of_subclasses(part)

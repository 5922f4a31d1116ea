"""Rules of the house that no linter knows.

`typing.final` is of no use for classes that recipes name: jsonargparse takes it to say that no
subclass can stand in their place, and refuses a `class_path`.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("qat", "binaryvit", "ptq_init")


def _ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in PACKAGES


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _concrete(kind: type) -> bool:
    """Whether nothing is left for a subclass to define; Lightning's metaclass is not `ABCMeta`."""
    members = (inspect.getattr_static(kind, name) for name in dir(kind))
    return not any(getattr(member, "__isabstractmethod__", False) for member in members)


def _classes() -> Iterator[type]:
    """Every class that a module of ours defines."""
    for package in map(importlib.import_module, PACKAGES):
        names = [
            found.name for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        ]
        for module in (package, *map(importlib.import_module, names)):
            for kind in vars(module).values():
                if inspect.isclass(kind) and kind.__module__ == module.__name__:
                    yield kind


def _subclassed() -> dict[str, list[str]]:
    """Classes of ours that subclass concrete ones of ours, and these."""
    found = {
        _name(k): [_name(b) for b in k.__bases__ if _ours(b) and _concrete(b)] for k in _classes()
    }
    return {name: bases for name, bases in found.items() if bases}


def test_no_concrete_class_is_subclassed() -> None:
    assert not _subclassed(), "put what they share into an abstract base, a function or a part"


@pytest.mark.parametrize(
    ("name", "concrete"),
    [
        ("qat.quantizers.log.Log", False),
        ("qat.quantizers.log.Log2", True),
        ("qat.lightning.training.Training", False),  # abstract methods without the metaclass
        ("qat.quantizers.affine.Affine", True),
    ],
)
def test_rule_knows_abstract_from_concrete(name: str, concrete: bool) -> None:
    kinds = {_name(kind): kind for kind in _classes()}
    assert _concrete(kinds[name]) == concrete


METHODS, FUNCTIONS = {"write_text", "write_bytes"}, {"os.replace", "os.rename", "shutil.move"}
"""What writes a file by its path, or moves one."""
OWNERS = ("qat/disk.py", "qat/cli/lock.py")


def _writes(source: str) -> list[int]:
    """Lines of a module that open a file to write it, or write or move one by its path."""
    lines = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name, values = ast.unparse(call.func), [*call.args, *(k.value for k in call.keywords)]
        modes = [value.value for value in values if isinstance(value, ast.Constant)]
        opens = any(re.fullmatch("r?b?[wax+]b?[+]?", str(mode)) for mode in modes)
        by_path = name.rpartition(".")[2] in METHODS or name in FUNCTIONS
        if by_path or (name.endswith("open") and opens):
            lines.append(call.lineno)
    return lines


def test_files_are_written_by_their_one_owner() -> None:
    found = {
        str(path.relative_to(ROOT)): _writes(path.read_text())
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    found = {path: lines for path, lines in found.items() if lines and path not in OWNERS}
    assert not found, "write by qat.disk, so that the old file stays until the new one is whole"


@pytest.mark.parametrize(
    ("source", "writes"),
    [
        ("open(path, 'w')", True),
        ("open(path, mode='ab')", True),
        ("path.open('x')", True),
        ("path.write_text(text)", True),
        ("os.replace(part, path)", True),
        ("open(path, newline='')", False),
        ("Image.open(path)", False),
        ("text.replace('a', 'b')", False),
        ("replace(value, key=1)", False),
    ],
)
def test_rule_knows_what_writes(source: str, writes: bool) -> None:
    assert bool(_writes(source)) == writes

"""Rules of the house that no linter knows.

`typing.final` is of no use for classes that recipes name: jsonargparse takes it to say that no
subclass can stand in their place, and refuses a `class_path`.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest

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

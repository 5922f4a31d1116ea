"""Recipes: YAML files that build on other YAML files.

A recipe may start from others, and states only what differs:

    base: [../imagenet_vit_tiny.yaml, repq.yaml]

A base is a file beside the recipe, or the name of a recipe that comes with the package.
Mappings merge key by key, later files win, and a mapping with another `class_path` replaces the
one before. `${oc.env:NAME}` is an environment variable, `${key.of.the.recipe}` another value.
A recipe may hold settings of several commands, such as `search`; each command reads its own.

`--config` takes the path of a file, or the name of a recipe that comes with the package, such as
`ptq/imagenet_vit_tiny_w4a4_repq`. A path in a recipe is tried relative to the recipe that states
it, then to the working directory. A value counts as a path where it holds a `/` or its key is one
of `PATHS`.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined] - public, unlisted
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat.cli.shorthand import resolved
from qat.documents import read_yaml
from qat.plan import nearest

PATHS = frozenset(
    {"base", "plan", "root", "path", "teacher", "teacher_config", "judge", "judge_config"}
    | {"weights", "ckpt_path", "like", "latency_table"}
)
PACKAGE = Path(__file__).parents[1]
SHIPPED = next(p for p in (PACKAGE / "configs", PACKAGE.parent / "configs") if p.is_dir())
"""The folder of the recipes that come with the package: inside it, or beside it in a checkout."""
OF_SOME_COMMANDS = frozenset(
    {"grid", "draws", "patchwise", "search", "method", "guard", "stream", "export"}
    | {"doctor", "format", "half", "verify"}
)
"""Sections that not all commands have; the others leave them out."""

Part = str | Path | Mapping[str, Any]
"""A recipe file, or settings as such."""


def load_recipe(*parts: Part) -> dict[str, Any]:
    """The recipe in a file, with what it builds on merged in and every reference resolved.

    Of several parts the later ones are laid over the earlier ones.

    Raises:
        ValueError: If a file or one it builds on is missing or no YAML mapping, or a reference
            cannot be resolved.
    """
    recipe: dict[str, Any] = {}
    for part in parts:
        composed = dict(part) if isinstance(part, Mapping) else compose(find(part))
        recipe = _merge(recipe, composed)
    for name in _class_paths(recipe):
        if name.partition(".")[0] in sys.stdlib_module_names:
            raise ValueError(
                f"class_path '{name}' is of Python itself, which has no model, quantizer, data or "
                "method; it is not imported"
            )
    try:
        found = OmegaConf.to_container(OmegaConf.create(recipe), resolve=True)
        return resolved(found)  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        hint = "; set it to the folder of the assets" if "LOWBIT_ASSETS" in reason else ""
        names = ", ".join("settings" if isinstance(p, Mapping) else f"'{p}'" for p in parts)
        raise ValueError(f"recipe {names}: {reason}{hint}") from None


def find(name: str | Path) -> Path:
    """The file that a recipe's name stands for; the name itself where there is none.

    It is tried as a path, then among the shipped recipes, each with and without its ending.
    """
    tried = (folder / f"{name}{end}" for folder in (Path(), SHIPPED) for end in ("", ".yaml"))
    return next((path for path in tried if path.is_file()), Path(name))


def compose(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The recipe in a file with what it builds on, its references not yet resolved.

    Args:
        path: The file.
        above: Files that build on this one.

    Raises:
        ValueError: If a file is missing or no YAML mapping, or builds on itself.
    """
    if path.resolve() in above:
        raise ValueError(f"recipe '{path}' builds on itself")
    try:
        recipe = read_yaml(path, "recipe")
    except FileNotFoundError:
        raise ValueError(f"no recipe '{path}'{_hint(path)}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe '{path}' must be a mapping, got {type(recipe).__name__}")
    if isinstance(grid := recipe.get("grid"), dict):
        recipe["grid"] = {axis: _named(choices, path) for axis, choices in grid.items()}
    return _with_bases(recipe, path, (*above, path.resolve()))


def _hint(path: Path) -> str:
    """What there is instead of a recipe: a shipped one of a like name, or those beside it."""
    shipped = [str(p.relative_to(SHIPPED).with_suffix("")) for p in SHIPPED.rglob("*.yaml")]
    if near := get_close_matches(str(path.with_suffix("")), shipped, n=1):
        return f"; did you mean '{near[0]}'?"
    beside = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    found = ", ".join(beside[:8])
    return f"; the folder holds {found}" if found else f"; recipes are in '{SHIPPED}'"


def _named(choices: Any, path: Path) -> Any:
    """An axis of a grid; settings among its choices may build on recipes, like a file."""
    if not isinstance(choices, dict):
        return _located("base", choices, path.parent)
    return {
        name: _with_bases(choice, path, (path.resolve(),))
        if isinstance(choice, dict)
        else _located("base", choice, path.parent)
        for name, choice in choices.items()
    }


def _with_bases(recipe: dict[str, Any], path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Settings that a file states, laid over what they build on."""
    recipe = _located("", recipe, path.parent)
    bases = recipe.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"recipe '{path}': base must be a file or a list of files, got {bases!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, compose(find(base), above))
    return _merge(merged, recipe)


def _located(key: str, value: Any, folder: Path) -> Any:
    """The value with every path that exists relative to the folder replaced by that file's."""
    if isinstance(value, dict):
        return {name: _located(str(name), item, folder) for name, item in value.items()}
    if isinstance(value, list):
        return [_located(key, item, folder) for item in value]
    if not isinstance(value, str) or not value or not ("/" in value or key in PATHS):
        return value
    path = os.path.normpath(folder / value)
    return path if os.path.exists(path) else value


def _merge(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if above.get("class_path", below.get("class_path")) != below.get("class_path"):
        return above
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _merge(below[key], value) if key in below else value
    return merged


def differences(theirs: Any, ours: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys in which two recipes differ, and the value of each."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in theirs | ours:
            yield from differences(theirs.get(name), ours.get(name), f"{key}.{name}".lstrip("."))
    elif theirs != ours:
        yield key, theirs, ours


def _class_paths(items: Any) -> Iterator[str]:
    """Every class path in a recipe."""
    if isinstance(items, Mapping):
        if isinstance(name := items.get("class_path"), str):
            yield name
        items = list(items.values())
    if isinstance(items, list):
        for item in items:
            yield from _class_paths(item)


class RecipeFile(ActionConfigFile):
    """The `--config` option: a recipe file, composed before it is parsed."""

    @staticmethod
    def apply_config(parser: Any, cfg: Any, dest: str, value: str) -> None:
        """Compose the recipe at `value` and parse it in place of the file."""
        known = [action.dest for action in parser._actions]
        others = OF_SOME_COMMANDS - {dest.split(".")[0] for dest in known}
        recipe = load_recipe(value)
        recipe = {key: value for key, value in recipe.items() if key not in others}
        try:
            _refuse_unknown(recipe, known)
        except ValueError as error:
            raise ValueError(f"recipe '{value}': {error}") from None
        text = yaml.safe_dump(recipe, sort_keys=False)  # the axes of a grid keep their order
        ActionConfigFile.apply_config(parser, cfg, dest, text)
        cfg[dest][-1] = value


def _refuse_unknown(items: Any, known: list[str], path: str = "") -> None:
    """Refuse keys that no argument has; parsing would drop those without content in silence.

    Arguments of a component that is named by `class_path` are left to the parser.
    """
    if not isinstance(items, dict) or "class_path" in items or path in known:
        return
    for key, value in items.items():
        inner = f"{path}.{key}".lstrip(".")
        if inner not in known and not any(option.startswith(f"{inner}.") for option in known):
            raise ValueError(f"unknown key '{inner}'" + nearest(inner, known))
        _refuse_unknown(value, known, inner)

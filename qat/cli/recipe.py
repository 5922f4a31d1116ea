"""Recipes: YAML files that build on other YAML files.

A recipe may start from others, named relative to itself, and states only what differs:

    base: [../imagenet_vit_tiny.yaml, w4a4.yaml]

Mappings merge key by key, later files win, and a mapping with another `class_path` replaces the
one before. `${oc.env:NAME}` is an environment variable, `${key.of.the.recipe}` another value.
A recipe may hold settings of several commands, such as `search`; each command reads its own.
"""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined] - public, unlisted
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat.plan import nearest


def load_recipe(*paths: str | Path) -> dict[str, Any]:
    """The recipe in a file, with what it builds on merged in and every reference resolved.

    Of several files the later ones are laid over the earlier ones.

    Raises:
        ValueError: If a file or one it builds on is missing or no YAML mapping, or a reference
            cannot be resolved.
    """
    recipe: dict[str, Any] = {}
    for path in paths:
        recipe = _merge(recipe, _compose(Path(path)))
    try:
        return OmegaConf.to_container(OmegaConf.create(recipe), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        hint = "; set it to the folder of the assets" if "LOWBIT_ASSETS" in reason else ""
        names = ", ".join(f"'{path}'" for path in paths)
        raise ValueError(f"recipe {names}: {reason}{hint}") from None


def _compose(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in above:
        raise ValueError(f"recipe '{path}' builds on itself")
    try:
        recipe = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        found = f"; the folder holds {', '.join(near[:8])}" if near else "; see configs/"
        raise ValueError(f"no recipe '{path}'{found}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe '{path}' is no YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe '{path}' must be a mapping, got {type(recipe).__name__}")
    bases = recipe.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"recipe '{path}': base must be a file or a list of files, got {bases!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, _compose(path.parent / base, (*above, path.resolve())))
    return _merge(merged, recipe)


def _merge(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if above.get("class_path", below.get("class_path")) != below.get("class_path"):
        return above
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _merge(below[key], value) if key in below else value
    return merged


class RecipeFile(ActionConfigFile):
    """The `--config` option: a recipe file, composed before it is parsed."""

    @staticmethod
    def apply_config(parser: Any, cfg: Any, dest: str, value: str) -> None:
        """Compose the recipe at `value` and parse it in place of the file."""
        try:
            recipe = load_recipe(value)
        except ValueError as error:
            raise TypeError(str(error)) from None
        of_others = getattr(parser, "keys_of_other_commands", ())
        recipe = {key: value for key, value in recipe.items() if key not in of_others}
        try:
            _refuse_unknown(recipe, [action.dest for action in parser._actions])
        except ValueError as error:
            raise TypeError(f"recipe '{value}': {error}") from None
        text = yaml.safe_dump(recipe, sort_keys=False)  # the lists of a grid keep their order
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

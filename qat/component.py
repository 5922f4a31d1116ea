"""Callables as data: how a checkpoint names the factories that built a model.

    a class or function          {"class_path": "qat.quantizers.lsq.LSQ"}
    a `functools.partial`        {"class_path": ..., "init_args": {...}}
    a dataclass instance         {"class_path": ..., "init_args": {its fields}}
    a mapping with class keys    {"items": [[key, value], ...]}

`describe` writes this form and `build` reads it. `build` imports by name, so it accepts names from
trusted packages only.
"""

import importlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from inspect import isclass, isfunction
from typing import Any

TRUSTED = ("qat", "binaryvit", "ptq_init", "torch.nn", "timm")


def describe(value: Any) -> Any:
    """Plain data that `build` turns back into `value`.

    Raises:
        ValueError: If `value` cannot be named, such as a lambda or an instance of a class that is
            no dataclass.
    """
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {"items": [[describe(key), describe(item)] for key, item in value.items()]}
    if isinstance(value, partial):
        callee, positional = value.func, value.args
        if callee.__module__.startswith("jsonargparse."):
            # It builds `partial(instantiator, ..., cls, **init_args)`.
            callee, positional = value.args[-1], ()
        if positional:
            raise ValueError(f"cannot store {value}: give a partial's arguments by keyword")
        items = {key: describe(item) for key, item in value.keywords.items()}
        return {"class_path": _path(callee), "init_args": items}
    if is_dataclass(value) and not isclass(value):
        items = {field.name: describe(getattr(value, field.name)) for field in fields(value)}
        return {"class_path": _path(type(value)), "init_args": items}
    return {"class_path": _path(value)}


def build(data: Any, trust: tuple[str, ...] = ()) -> Any:
    """Turn what `describe` wrote back into an object.

    Args:
        data: Plain data.
        trust: Packages, besides our own, torch.nn and timm, whose names may be imported.

    Raises:
        ValueError: If a name is outside the trusted packages or does not exist.
    """
    if isinstance(data, list):
        return tuple(build(item, trust) for item in data)
    if not isinstance(data, dict):
        return data
    if "items" in data:
        return {build(key, trust): build(item, trust) for key, item in data["items"]}
    target = _import(data["class_path"], (*TRUSTED, *trust))
    if "init_args" not in data:
        return target
    arguments = {key: build(item, trust) for key, item in data["init_args"].items()}
    make = partial(target, **arguments)
    return make() if is_dataclass(target) else make


def _path(value: Any) -> str:
    name = getattr(value, "__qualname__", "<instance>")
    if not (isclass(value) or isfunction(value)) or "<" in name:
        raise ValueError(
            f"cannot store {value!r} in a checkpoint: use a class, a module-level function, a "
            "functools.partial of one, or a dataclass instance"
        )
    return f"{value.__module__}.{name}"


def _import(path: str, trusted: tuple[str, ...]) -> Any:
    module, _, name = path.rpartition(".")
    _require_trust(module, path, trusted)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"the checkpoint names '{path}', which does not exist here; install the version that "
            f"wrote it ({error})"
        ) from None
    # A trusted module may itself have imported the name from elsewhere.
    _require_trust(getattr(found, "__module__", ""), path, trusted)
    return found


def _require_trust(module: str, path: str, trusted: tuple[str, ...]) -> None:
    if not any(f"{module}.".startswith(f"{package}.") for package in trusted):
        raise ValueError(
            f"the checkpoint names '{path}', outside the trusted packages {', '.join(trusted)}; "
            "if it is yours, load with trust=('its_package',)"
        )

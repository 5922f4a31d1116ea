"""Callables as data: how a checkpoint names the factories that built a model.

    a class or function          {"class_path": "qat.quantizers.lsq.LSQ"}
    a `functools.partial`        {"class_path": ..., "init_args": {...}}
    a dataclass instance         {"class_path": ..., "init_args": {its fields}}
    a mapping with class keys    {"items": [[key, value], ...]}

`describe` writes this form and `build` reads it. What `build` reads may be a stranger's, so it is
told what it has to find: a factory of quantizers, a number, a choice. A name is looked at before
anything is imported, what it names has to be of the kind, and its arguments of the types that its
signature declares.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from inspect import Parameter, isabstract, isclass, isfunction, signature
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

HOMES = ("qat.quantizers", "qat.convert", "qat.products", "binaryvit", "ptq_init")
"""Where quantizers, factories and handlers of ours live."""
GONE = "which does not exist here; install the version that wrote it"


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


def build(data: Any, kind: Any, trust: tuple[str, ...] = ()) -> Any:
    """Turn what `describe` wrote back into an object.

    Args:
        data: Plain data.
        kind: What is wanted, as a type annotation: a plain type, an enumeration, a union, a tuple,
            or `Callable[[...], R]`, which classes below R make, and factories that return one.
        trust: Packages of the caller whose names may be imported and called as well.

    Raises:
        ValueError: If it is something else, or names what is not trusted or does not exist.
    """
    origin = get_origin(kind)
    if kind in (Any, None):
        return _unstated(data, trust)
    if origin in (Union, UnionType):
        return _any_of(data, get_args(kind), trust)
    if origin is Callable:
        given, result = get_args(kind)
        return _factory(data, given, result, trust)
    if origin is Literal and data in get_args(kind):
        return data
    if origin is tuple and isinstance(data, list | tuple):
        item, *others = get_args(kind)
        if others == [...] or len(others) + 1 == len(data):
            return tuple(build(part, item, trust) for part in data)
    if isclass(kind) and issubclass(kind, Enum):
        kind = next((member for member in kind if member.value == data), kind)
        if isinstance(kind, Enum):
            return kind
    elif type(data) is (origin or kind):
        return data
    elif kind is float and type(data) is int:
        return float(data)
    raise ValueError(f"{_short(data)} is no {getattr(kind, '__name__', kind)}")


def _unstated(data: Any, trust: tuple[str, ...]) -> Any:
    """A value of an argument without an annotation, as a function of the caller may have."""
    if isinstance(data, dict) and "class_path" in data:
        return _factory(data, [], object, trust)
    return data


def _any_of(data: Any, kinds: tuple[Any, ...], trust: tuple[str, ...]) -> Any:
    if data is None and NoneType in kinds:
        return None
    *others, last = [kind for kind in kinds if kind is not NoneType]
    for kind in others:
        try:
            return build(data, kind, trust)
        except ValueError:
            continue
    return build(data, last, trust)


def _factory(data: Any, given: list[Any], result: type, trust: tuple[str, ...]) -> Any:
    """What is called with `given` and returns a `result`."""
    if not (isinstance(data, dict) and data.keys() <= {"class_path", "init_args"}):
        raise ValueError(f"{_short(data)} is no class_path with init_args")
    target = named(data.get("class_path"), trust)
    if not (isclass(target) or isfunction(target)):
        raise ValueError(f"'{data['class_path']}' is no class or function")
    if not (is_trusted(data["class_path"], trust) or _makes(target, result)):
        raise ValueError(f"'{data['class_path']}' makes no {result.__name__}")
    whole = is_dataclass(target)  # its instances are called
    skip = 0 if whole else len(given)
    arguments = arguments_of(target, data.get("init_args", {}), skip, trust)
    if "init_args" not in data:
        return target
    return target(**arguments) if whole else partial(target, **arguments)


def _makes(target: Any, result: type) -> bool:
    """Whether calling a class, or an instance of a dataclass, gives a `result`."""
    if not isclass(target) or isabstract(target):
        return False
    made = get_type_hints(target.__call__).get("return") if is_dataclass(target) else target
    return isclass(made) and issubclass(made, result)


def arguments_of(
    target: Callable[..., Any], data: Any, skip: int = 0, trust: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Arguments by name, each of the type that the signature declares.

    Args:
        target: A class or function.
        data: The arguments as plain data.
        skip: Number of first parameters that are not to be set.
        trust: As in `build`.

    Raises:
        ValueError: If one is unknown or of another type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{_short(data)} are no arguments by name")
    hints = get_type_hints(target.__init__ if isclass(target) else target)
    parameters = list(signature(target).parameters.values())[skip:]
    variadic = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    known = {p.name for p in parameters if p.kind not in variadic}
    made = {}
    for key, value in data.items():
        if key not in known:
            raise ValueError(f"{target.__name__} has no argument '{_short(key)}'")
        try:
            made[key] = build(value, hints.get(key), trust)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return made


def named(path: Any, trust: tuple[str, ...] = ()) -> Any:
    """What a dotted path names, in the homes of our kinds or in the packages of the caller.

    Raises:
        ValueError: If it lies elsewhere, which is seen before anything is imported, or does not
            exist.
    """
    module, name = home_of(path, trust), str(path).rpartition(".")[2]
    found = getattr(module, name, None)
    if found is None:
        raise ValueError(f"the checkpoint names '{_short(path)}', {GONE}")
    # A trusted module may itself have imported the name from elsewhere.
    _require_trust(getattr(found, "__module__", ""), path, trust)
    return found


def home_of(path: Any, trust: tuple[str, ...] = ()) -> ModuleType:
    """The module that a dotted path lies in, imported.

    Raises:
        ValueError: As `named`.
    """
    module = path.rpartition(".")[0] if isinstance(path, str) else ""
    _require_trust(module, path, trust)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"the checkpoint names '{_short(path)}', {GONE} ({error})"
        raise ValueError(message) from None


def is_trusted(path: str, packages: tuple[str, ...]) -> bool:
    """Whether a dotted path lies in one of the packages."""
    return any(f"{path}.".startswith(f"{package}.") for package in packages)


def _require_trust(module: Any, path: Any, trust: tuple[str, ...]) -> None:
    parts = module.split(".") if isinstance(module, str) else [""]
    if not (all(part.isidentifier() for part in parts) and is_trusted(module, (*HOMES, *trust))):
        raise ValueError(
            f"the checkpoint names '{_short(path)}', which is none of the quantizers, factories, "
            "handlers and builders that a file may name; if it is yours, load with "
            "trust=('its_package',)"
        )


def _path(value: Any) -> str:
    name = getattr(value, "__qualname__", "<instance>")
    if not (isclass(value) or isfunction(value)) or "<" in name:
        raise ValueError(
            f"cannot store {value!r} in a checkpoint: use a class, a module-level function, a "
            "functools.partial of one, or a dataclass instance"
        )
    return f"{value.__module__}.{name}"


def _short(value: Any) -> str:
    return str(value)[:80]

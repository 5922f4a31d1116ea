"""The model that a manifest describes: first without memory, compared with the file, then for real.

A manifest may describe any model, also one that no machine can hold. So it is built on the meta
device, where building stops at more parameters than the file has tensors; then names, shapes and
bytes are compared with the file. Only what fits is built.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from threading import get_ident
from typing import Any

import torch
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from qat.archive import first_line
from qat.card import amend
from qat.component import arguments_of, is_trusted, named
from qat.convert import convert_
from qat.manifest import WINDOWS, Manifest, floating_dtype
from qat.models import architecture_arguments, timm_model
from qat.preprocessing import Preprocessing

BUILDERS = {
    "qat.diffusion.build.dit": "qat.diffusion.model.DiT",
    "qat.diffusion.judge.judge": "qat.diffusion.judge.Judge",
}
"""Functions of ours that a recipe may name, and the classes whose arguments they take."""
ARGUMENTS = ("name", "num_classes", "img_size", "in_chans", "data_config", "model_args")
"""Arguments of `qat.timm_model` that a recipe may hold: none of them opens a file or connects."""
LARGEST = 2**16
"""Largest number in a recipe; sizes, widths and classes are smaller."""
SLACK_BYTES = 100 * 2**20
"""Bytes that a model may hold beside the tensors of its file."""


def build_model(recipe: Mapping[str, Any], trust: tuple[str, ...] = ()) -> nn.Module:
    """The float model of a recipe: one of timm's, or what a builder makes.

    Args:
        recipe: The recipe.
        trust: Packages of the caller whose builders it may name.

    Raises:
        ValueError: If it names anything else, or an argument that is none of an architecture.
    """
    _require_small(recipe)
    if "class_path" in recipe:
        return _by_name(recipe["class_path"], recipe.get("init_args", {}), trust)
    _require_among(recipe, ARGUMENTS, "a recipe")
    made = arguments_of(timm_model, dict(recipe))
    _require_among(made.get("data_config"), Preprocessing.__annotations__, "data_config")
    _require_among(made.get("model_args"), architecture_arguments(made["name"]), "model_args")
    return timm_model(**made)


def rebuilt(
    data: Manifest, state: Mapping[str, Any], size: int, trust: tuple[str, ...]
) -> nn.Module:
    """The model of a manifest without values, once it is known that the tensors fit.

    Args:
        data: The manifest.
        state: The model's tensors.
        size: Bytes of them all.
        trust: Packages of the caller.

    Raises:
        ValueError: If it cannot be built, does not fit, or takes more memory than the file.
    """
    if _is_vouched_for(data):
        model = assembled(data, state, trust)
        load_into(model, state, data)
        return model
    with _on_meta(1000 + 4 * len(state)):
        model = assembled(data, state, trust)
        empty = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in state.items()}
        load_into(model, empty, data)
    _require_types(model, state)
    _require_bytes(model, size)
    return model


def require_size(data: Manifest, count: int, size: int, trust: tuple[str, ...]) -> None:
    """Refuse a manifest whose model is larger than what a file of packed tensors can fill.

    Args:
        data: The manifest.
        count: Tensors in the file.
        size: Most bytes that they unpack to.
        trust: Packages of the caller.

    Raises:
        ValueError: If so, or it cannot be built.
    """
    if not _is_vouched_for(data):
        with _on_meta(1000 + 4 * count):
            _require_bytes(assembled(data, {}, trust), size)


def _is_vouched_for(data: Manifest) -> bool:
    """Whether the caller's own builder makes the model; it is not tried on the meta device."""
    path = data.recipe.get("class_path")
    return path is not None and path not in BUILDERS


def _require_bytes(model: nn.Module, size: int) -> None:
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers())}.values()
    if (needed := sum(t.numel() * t.itemsize for t in tensors)) > size + SLACK_BYTES:
        raise ValueError(f"it describes a model of {needed:,} bytes, but its tensors have {size:,}")


def assembled(data: Manifest, state: Mapping[str, Any], trust: tuple[str, ...]) -> nn.Module:
    """The model of a manifest, converted, with starting values in the types of the tensors."""
    try:
        model = build_model(data.recipe, trust)
        _require_scaled_windows(data, model)
        amend(model, recipe=data.recipe, preprocessing=data.preprocessing)
        amend(model, class_names=data.class_names, start=data.start)
        if data.start is not None:
            model.get_parameter(data.start.parameter)
        if data.conversion is not None:
            convert_(model, *data.converting(trust))
    except ValueError:
        raise
    except Exception as error:  # what a stranger's arguments do to a builder cannot be foreseen
        raise ValueError(f"its model cannot be built ({first_line(error)})") from None
    model.to(data.dtype or floating_dtype(state))
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        saved = state.get(name)
        if isinstance(saved, Tensor) and saved.is_floating_point() and tensor.is_floating_point():
            tensor.data = tensor.data.to(saved.dtype)
    return model


def load_into(model: nn.Module, state: Mapping[str, Any], data: Manifest) -> None:
    """Load tensors into the model that a manifest describes.

    Raises:
        ValueError: If they do not fit, with the versions that wrote them.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise ValueError(
            f"it does not fit the model it describes ({' '.join(lines)[:300]}); it was written "
            f"with {data.versions!s:.160}"
        ) from None


@contextmanager
def _on_meta(limit: int) -> Iterator[None]:
    """Build on the meta device, at most so many parameters."""
    count, thread = 0, get_ident()

    def counted(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        count += get_ident() == thread
        if count > limit:
            raise ValueError("it describes a model of more parameters than it has tensors")

    handle = register_module_parameter_registration_hook(counted)
    try:
        with torch.device("meta"):
            yield
    finally:
        handle.remove()


def _by_name(path: Any, arguments: Any, trust: tuple[str, ...]) -> nn.Module:
    if path in BUILDERS:
        homes = tuple(name.rpartition(".")[0] for name in (path, BUILDERS[path]))
        return named(path, homes)(**arguments_of(named(BUILDERS[path], homes), arguments))
    if not (isinstance(path, str) and is_trusted(path, trust)):
        raise ValueError(
            f"the checkpoint names the builder '{path!s:.80}', which is none of timm's models and "
            f"of {', '.join(BUILDERS)}; if it is yours, load with trust=('its_package',)"
        )
    builder = named(path, trust)
    return builder(**arguments_of(builder, arguments, 0, trust))


def _require_among(found: Any, known: Any, what: str) -> None:
    if unknown := set(found or ()) - set(known):
        raise ValueError(f"{what} holds '{sorted(unknown)[0]:.80}', which a file may not set")


def _require_small(recipe: Mapping[str, Any]) -> None:
    waiting: list[Any] = [recipe]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            waiting += part.values()
        elif isinstance(part, list | tuple):
            waiting += part
        elif isinstance(part, int) and abs(part) > LARGEST:
            raise ValueError(f"a recipe holds {part}; the largest number in one is {LARGEST}")


def _require_types(model: nn.Module, state: Mapping[str, Any]) -> None:
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.dtype != state[name].dtype:
            raise ValueError(f"'{name}' is {state[name].dtype}, its model has {value.dtype}")


def _require_scaled_windows(data: Manifest, model: nn.Module) -> None:
    handlers = str((data.conversion or {}).get("handlers"))
    if WINDOWS in handlers and any(isinstance(m, WindowAttention) for m in model.modules()):
        raise ValueError(
            "it holds a Swin whose queries were quantized before they were scaled, which they no "
            "longer are; quantize or train the float model again"
        )

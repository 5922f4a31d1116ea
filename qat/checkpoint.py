"""One file that rebuilds a model in an empty process.

The file is a torch archive of plain data and tensors, read with `weights_only=True`: no pickled
code runs. Beside the `state_dict` it holds a manifest: how to build the float model, the plan and
factories of the conversion, the preprocessing, versions, and a hash of every tensor. Training
checkpoints of Lightning carry the same manifest, so `load` reads both.
"""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from qat import disk, packed, runtime
from qat.card import Start, amend, card_of, expected_by, untrained
from qat.component import build, describe
from qat.convert import convert_
from qat.models import timm_model
from qat.plan import Plan
from qat.preprocessing import Preprocessing
from qat.unpack import fill_

FORMAT = "lowbit-vit/1"
MANIFEST = "lowbit"


def manifest(model: nn.Module, state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What rebuilds `model` around the tensors `state`.

    Args:
        model: A model with a card, converted or not.
        state: State dictionary that goes into the same file.
        prefix: Prefix of the model's keys in `state`, such as `model.`.

    Raises:
        ValueError: If the model does not carry its recipe, or its factories cannot be named.
    """
    card = card_of(model)
    if card.recipe is None:
        raise ValueError(
            "the model's card does not say how it is built, so a checkpoint could not rebuild it; "
            "say so with qat.adopt(model, recipe=...), or build it with qat.timm_model(name, ...)"
        )
    for key, value in card.recipe.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError(
                f"the model was built with {key} {value!r}, which is no plain data, so a "
                "checkpoint cannot hold it; use numbers, strings, lists and mappings"
            ) from None
    conversion = card.conversion
    return {
        "format": FORMAT,
        "model": card.recipe,
        "preprocessing": expected_by(model).to_dict(),
        "start": asdict(card.start) if card.start and untrained(model) else None,
        "class_names": card.class_names and list(card.class_names),
        "conversion": None
        if conversion is None
        else {
            "plan": conversion.plan.to_list(),
            "make_quantizer": describe(conversion.make_quantizer),
            "handlers": describe(conversion.handlers),
        },
        "prefix": prefix,
        "sha256": digest(_select(state, prefix)),
        "versions": {"torch": str(torch.__version__), "timm": timm.__version__},
    }


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model to one file, atomically: a reader sees the old file or the new one.

    Raises:
        ValueError: If the model cannot be rebuilt, see `manifest`.
        OSError: If the disk fails; the old file is whole all the same.
    """
    state = model.state_dict()
    content = {MANIFEST: manifest(model, state), "state_dict": state}
    with disk.replacing(path) as file:
        torch.save(content, file)


def load(path: str | Path, trust: tuple[str, ...] = ()) -> nn.Module:
    """Rebuild the model in a file, in evaluation mode, with bit-identical logits.

    Args:
        path: A file from `save`, a training checkpoint, or a packed file.
        trust: Your own packages whose quantizers or handlers the file may name.

    Raises:
        ValueError: If the file is missing, damaged, of another program, or names code that is not
            trusted.
    """
    if packed.is_packed(path):
        return _unpacked(path, trust)
    checkpoint = read(path)
    data = checkpoint[MANIFEST]
    state = _select(checkpoint["state_dict"], data["prefix"])
    if digest(state) != data["sha256"]:
        raise ValueError(f"checkpoint '{path}' is damaged: its tensors do not match their hash")
    model = _rebuilt(data, path, trust)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise ValueError(
            f"checkpoint '{path}' does not fit the model it describes ({' '.join(lines)[:300]}); "
            f"it was written with {data['versions']}"
        ) from None
    return model.eval()


def _rebuilt(data: Mapping[str, Any], path: str | Path, trust: tuple[str, ...]) -> nn.Module:
    """The model that a manifest describes, converted, its tensors still at their start."""
    model = build_model(data["model"], trust)
    handlers = str((data["conversion"] or {}).get("handlers"))
    if WINDOWS in handlers and any(isinstance(m, WindowAttention) for m in model.modules()):
        raise ValueError(
            f"checkpoint '{path}' holds a Swin whose queries were quantized before they were "
            "scaled, which they no longer are; quantize or train the float model again"
        )
    names = data.get("class_names")
    amend(
        model,
        preprocessing=Preprocessing.from_dict(data["preprocessing"]),
        class_names=names and tuple(names),
        start=Start(**start) if (start := data.get("start")) else None,
    )
    if (conversion := data["conversion"]) is not None:
        convert_(
            model,
            Plan.from_list(conversion["plan"]),
            build(conversion["make_quantizer"], trust),
            build(_renamed(conversion["handlers"]), trust),
        )
    return model


def _unpacked(path: str | Path, trust: tuple[str, ...]) -> nn.Module:
    """The model in a packed file."""
    found = packed.read(path)
    runtime.run(found, path)  # refuses what contradicts itself
    try:
        model = _rebuilt(found.card, path, trust)
        fill_(model, found)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"packed file '{path}' is inconsistent ({error!r:.160})") from None
    except ValueError as error:
        raise ValueError(f"packed file '{path}': {error}") from None
    return model.eval()


RENAMED = {
    "timm.layers.attention.Attention": "qat.products.Pair",
    "qat.convert.quant_attention": "qat.convert.quant_pair",
    "qat.convert.quant_conv2d": "qat.convert.quant_conv",
    "binaryvit.convert.react_attention": "binaryvit.convert.react_pair",
}
"""Names in files that were written when attention had twins of its own."""
WINDOWS = "timm.models.swin_transformer.WindowAttention"


def _renamed(handlers: Any) -> Any:
    """Handlers of a file under the names of today; those of windows have gone into the others."""
    if not isinstance(handlers, dict) or "items" not in handlers:
        return handlers
    kept = [pair for pair in handlers["items"] if pair[0] != {"class_path": WINDOWS}]
    return {"items": [[_todays(part) for part in pair] for pair in kept]}


def _todays(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _todays(value) for key, value in data.items()}
    return RENAMED.get(data, data) if isinstance(data, str) else data


def build_model(recipe: Mapping[str, Any], trust: tuple[str, ...] = ()) -> nn.Module:
    """The float model of a recipe: one of timm's, or what a named function builds."""
    return build(recipe, trust)() if "class_path" in recipe else timm_model(**recipe)


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file as plain data, after checking every byte of it.

    Raises:
        ValueError: If it is missing, truncated, altered, or not a checkpoint of this program.
    """
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint '{path}'; expected a file from fit or quantize")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"checksum of '{broken}' does not match")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"'{path}' holds Python code, or objects that are no plain data, and is not run; it is "
            f"no {FORMAT} checkpoint ({_first_line(error)})"
        ) from None
    except Exception as error:  # a damaged archive can fail in any way while it is parsed
        raise ValueError(
            f"'{path}' is truncated or damaged, or no checkpoint ({_first_line(error)}); "
            "restore it from a copy, or resume from another one in the same folder; float "
            "weights go into the model's `weights` setting"
        ) from None
    found = checkpoint.get(MANIFEST, {}) if isinstance(checkpoint, dict) else {}
    if found.get("format") != FORMAT:
        raise ValueError(
            f"'{path}' is no {FORMAT} checkpoint (found format {found.get('format')}); for plain "
            "float weights use the model's `weights` setting"
        )
    return checkpoint


def digest(state: dict[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dictionary, in name order."""
    sha = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
        else:
            sha.update(f"{name} {value!r}".encode())
    return sha.hexdigest()


def _select(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def require_same(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse a checkpoint whose manifest describes another model than ours.

    Raises:
        ValueError: Naming the first part that differs and both values.
    """
    for part in ("model", "preprocessing", "conversion"):
        if describe(theirs.get(part)) != describe(ours[part]):
            raise ValueError(
                f"the checkpoint holds another {part} than the recipe asks for: "
                f"{_difference(theirs.get(part), ours[part])}; use the recipe that wrote it, or "
                "another --run_dir"
            )


def _difference(theirs: Any, ours: Any, path: str = "") -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in ours:
            if theirs.get(key) != ours[key]:
                return _difference(theirs.get(key), ours[key], f"{path}{key} ")
    return f"{path}is {str(theirs)[:80]} there and {str(ours)[:80]} here"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]

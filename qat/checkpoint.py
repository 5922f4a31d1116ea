"""One file that rebuilds a model in an empty process.

The file is a torch archive of plain data and tensors, and may be a stranger's: no code in it runs,
what it names is looked up in a closed list, and it takes no more memory than its size allows.
Beside the `state_dict` it holds a manifest: how to build the float model, the plan and factories of
the conversion, the preprocessing, class names, versions, and a hash of it all. Training checkpoints
of Lightning carry the same manifest, so `load` reads both.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat import disk, packed, runtime
from qat.archive import Foreign, digest, first_line, load_archive, require_bounded
from qat.component import describe
from qat.fidelity import manifest, owned, require_loadable, require_same_model, require_usable
from qat.manifest import FORMAT, OLDER, Manifest, selected
from qat.rebuild import assembled, build_model, load_into, rebuilt, require_size
from qat.unpack import fill_

__all__ = [
    "MANIFEST",
    "build_model",
    "digest",
    "load",
    "manifest",
    "read",
    "require_loadable",
    "require_same",
    "save",
]

MANIFEST = "lowbit"
BITS_OF_A_FLOAT = 32
"""So many times a packed file may grow: its narrowest weights have one bit."""


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model to one file, atomically: a reader sees the old file or the new one.

    A model of `torch.compile` is saved as the one inside.

    Raises:
        ValueError: If `load` could not make the same model of it, see `qat.fidelity`.
        OSError: If the disk fails; the old file is whole all the same.
    """
    model = getattr(model, "_orig_mod", model)
    require_usable(model)
    state = owned(model.state_dict())
    content = manifest(model, state)
    require_same_model(content, state, model)
    with disk.replacing(path) as file:
        torch.save({MANIFEST: content, "state_dict": state}, file)


def load(path: str | Path, trust: tuple[str, ...] = ()) -> nn.Module:
    """Rebuild the model in a file, in evaluation mode, with bit-identical logits.

    Args:
        path: A file from `save`, a training checkpoint, or a packed file; it may be a stranger's.
        trust: Your own packages whose quantizers, handlers or builders the file may name.

    Raises:
        ValueError: If the file is missing, damaged, of another program, or names code that is not
            trusted.
    """
    if packed.is_packed(path):
        return _unpacked(path, trust)
    checkpoint = read(path)
    try:
        data = Manifest.of(checkpoint[MANIFEST])
        return _loaded(data, selected(checkpoint["state_dict"], data.prefix), trust)
    except ValueError as error:
        raise ValueError(f"checkpoint '{path}': {error}") from None


def _loaded(data: Manifest, state: dict[str, Any], trust: tuple[str, ...]) -> nn.Module:
    size = require_bounded(state)
    data.require_sealed(state)
    rebuilt(data, state, size, trust)
    model = assembled(data, state, trust)
    load_into(model, state, data)
    require_usable(model)
    return model.eval()


def _unpacked(path: str | Path, trust: tuple[str, ...]) -> nn.Module:
    """The model in a packed file, whose hash is that of the whole file."""
    found = packed.read(path)
    runtime.run(found, path)  # refuses what contradicts itself
    try:
        data = Manifest.of_card(found.card)
        size = sum(tensor.nbytes for tensor in found.tensors.values())
        require_size(data, len(found.tensors), size * BITS_OF_A_FLOAT, trust)
        model = assembled(data, {}, trust)
        fill_(model, found)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"packed file '{path}' is inconsistent ({error!r:.160})") from None
    except ValueError as error:
        raise ValueError(f"packed file '{path}': {error}") from None
    return model.eval()


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file as plain data, after checking every byte of it.

    Raises:
        ValueError: If it is missing, truncated, altered, or not a checkpoint of this program.
    """
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint '{path}'; expected a file from fit or quantize")
    if Path(path).suffix == ".onnx":
        raise ValueError(
            f"'{path}' is an ONNX file, which test and predict can run; for anything else name the "
            "checkpoint that it was exported from"
        )
    try:
        checkpoint = load_archive(path)
    except Foreign as error:
        raise ValueError(
            f"'{path}' holds Python code, or objects that are no plain data, and is not run; it is "
            f"no {FORMAT} checkpoint ({first_line(error)})"
        ) from None
    except Exception as error:  # a damaged archive can fail in any way while it is parsed
        raise ValueError(
            f"'{path}' is truncated or damaged, or no checkpoint ({first_line(error)}); "
            "restore it from a copy, or resume from another one in the same folder; float "
            "weights go into the model's `weights` setting"
        ) from None
    found = checkpoint if isinstance(checkpoint, dict) else {}
    content, state = found.get(MANIFEST), found.get("state_dict")
    known = isinstance(content, dict) and content.get("format") in (FORMAT, OLDER)
    if not (known and isinstance(state, dict) and all(isinstance(key, str) for key in state)):
        raise ValueError(f"'{path}' is no {FORMAT} checkpoint: it {_what_it_is(found)}")
    try:
        Manifest.of(content)
    except ValueError as error:
        raise ValueError(f"checkpoint '{path}': {error}") from None
    return checkpoint


def _what_it_is(found: dict[str, Any]) -> str:
    """What a torch file of another program holds, and what reads it."""
    content = found.get(MANIFEST)
    if content is not None:
        stated = content.get("format") if isinstance(content, dict) else content
        return f"says format {stated!r:.40}; install the version that wrote it"
    if "pytorch-lightning_version" in found:
        return (
            "is a plain Lightning checkpoint, which does not say how to build its model; build it "
            "with qat.timm_model, load the `state_dict` into that, and qat.save it"
        )
    return "holds no manifest; plain float weights go into the model's `weights` setting"


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

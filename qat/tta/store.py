"""Where the state of a stream survives a crash: two generations, checked byte by byte.

A generation is one file: a line with the format and the SHA-256 of all that follows, a line of JSON
(the manifest: which model, which method, counts, SHA-256 of every tensor), then the tensors in the
safetensors format. Nothing in it is executed. A save replaces the *older* generation, by way of
`qat.disk`, so at every moment one whole generation is on the disk.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qat import disk
from qat.archive import digest

FORMAT = "lowbit-vit-stream/2"
SLOTS = ("state-0.stream", "state-1.stream")


class Store:
    """Two generations of saved states in a folder.

    Args:
        folder: The folder; made when something is saved.
        identity: Plain data that says what the state belongs to; a state of another is refused.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.identity = json.loads(json.dumps(identity))
        self.generation = 0

    def save(self, tensors: Mapping[str, Tensor], items: Mapping[str, Any]) -> None:
        """Save a state; when this returns it is on the disk.

        Args:
            tensors: Its tensors.
            items: Its plain data.

        Raises:
            OSError: If the disk fails; the generation saved last is whole all the same.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        generation = self.generation + 1
        target = self.folder / SLOTS[generation % 2]
        disk.write(target, pack(tensors, {**self._header(generation), "items": items}))
        self.generation = generation

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
        """The newest whole generation.

        Returns:
            Its tensors, its plain data, and why a newer generation, if there is one, is not it.

        Raises:
            ValueError: If there is none, saying what is wrong with each.
        """
        found: list[tuple[int, dict[str, Tensor], dict[str, Any]]] = []
        problems: list[str] = []
        for path in (self.folder / slot for slot in SLOTS):
            if not path.exists():
                continue
            try:
                tensors, manifest = unpack(path.read_bytes())
                require_like(manifest, {**self._header(0), "items": {}, "sha256": {}}, "manifest")
                self._require_same(manifest["identity"])
                found.append((manifest["generation"], tensors, manifest["items"]))
            except (ValueError, OSError) as error:
                problems.append(f"{path.name}: {error}")
        if not found:
            raise ValueError(
                f"no saved state in '{self.folder}' to continue from"
                + (f" ({'; '.join(problems)})" if problems else "")
            )
        self.generation, tensors, items = max(found, key=lambda each: each[0])
        return tensors, items, problems

    def _header(self, generation: int) -> dict[str, Any]:
        return {"generation": generation, "identity": self.identity}

    def _require_same(self, identity: Any) -> None:
        if not isinstance(identity, dict):
            raise ValueError(f"its identity is {_short(identity)}, expected a mapping")
        for key in sorted(self.identity.keys() | identity.keys()):
            theirs, ours = identity.get(key), self.identity.get(key)
            if theirs != ours:
                raise ValueError(
                    f"it belongs to another {key}: {_short(theirs)} there, {_short(ours)} here"
                )


def pack(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> bytes:
    """The bytes of a generation."""
    # Copies, because states share tensors with each other and the format allows none to.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    hashes = {name: digest({name: value}) for name, value in tensors.items()}
    line = json.dumps({**manifest, "sha256": hashes}, sort_keys=True).encode()
    return disk.seal(FORMAT, line + b"\n" + save(tensors))


def unpack(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and manifest of a generation.

    Raises:
        ValueError: If a byte of it is not as it was written.
    """
    body = disk.unseal(FORMAT, content)
    line, _, rest = body.partition(b"\n")
    try:
        manifest = json.loads(line)
        hashes = dict(manifest["sha256"])
        tensors = load(rest)
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"it is damaged: {type(error).__name__} {error}") from None
    for name in tensors.keys() | hashes.keys():
        if name not in tensors or digest({name: tensors[name]}) != hashes.get(name):
            raise ValueError(f"it is damaged: tensor '{name}' does not match its hash")
    return tensors, manifest


def require_like(found: Any, own: Any, name: str) -> None:
    """Refuse plain data that is not of the form of what we hold ourselves.

    Args:
        found: What was read.
        own: Ours: a mapping, whose keys have to be there, or none for any; a text; or a number,
            which stands for finite numbers that are not negative, whole ones where it is whole.
        name: What it is, for the message.

    Raises:
        ValueError: Naming the part.
    """
    if isinstance(own, dict):
        if not isinstance(found, dict) or own.keys() - found:
            raise ValueError(f"its {name} is {_short(found)}, expected a mapping of {sorted(own)}")
        for key, value in own.items():
            if key != "identity":  # compared by what it says, not by its form
                require_like(found[key], value, f"{name} {key}")
    elif isinstance(own, str):
        if not isinstance(found, str):
            raise ValueError(f"its {name} is {_short(found)}, expected text")
    elif type(found) not in (int, type(own)) or not 0 <= found < math.inf:
        raise ValueError(f"its {name} is {_short(found)}, expected a number that is not negative")


def require_tensors_like(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not of the names, types and shapes of ours, or not finite.

    Raises:
        ValueError: Naming the first.
    """
    forms = [
        {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
        for tensors in (found, own)
    ]
    for name in sorted(forms[0].keys() | forms[1].keys()):
        theirs, ours = (form.get(name) for form in forms)
        if theirs != ours:
            raise ValueError(
                f"the saved state has '{name}' as {theirs}, expected {ours}; continue with the "
                "method and model that saved it"
            )
        if not found[name].isfinite().all():
            raise ValueError(f"the saved state has values in '{name}' that are not finite")


def _short(value: Any) -> str:
    return str(value)[:60]

"""Files of strangers: a torch archive read as plain data and tensors, within the size of the file.

`torch.load(weights_only=True)` runs no code, but it does not check the bytes, it inflates what is
compressed, some of what it may call takes memory by the number, and a tensor may claim more values
than its bytes hold. All of that is refused here.
"""

import hashlib
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
CALLED = {
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {name}" for name in DTYPES),
    *(f"torch {name}Storage" for name in STORAGES),
}
"""What the pickle of a checkpoint names: nothing of it runs code or takes memory by the number."""
NUM_NODES, DEPTH = 100_000, 40


class Foreign(ValueError):
    """An archive that names more than plain data and tensors."""


def load_archive(path: str | Path) -> Any:
    """The content of a torch archive.

    Raises:
        Foreign: If it names code, or objects that are no plain data; they are not run or made.
        Exception: Of any kind, if it is damaged or takes more memory than its size.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise zipfile.BadZipFile("its entries are compressed, which torch never writes")
        if sum(entry.file_size for entry in entries) > Path(path).stat().st_size:
            raise zipfile.BadZipFile("its entries claim more bytes than the file has")
        if (broken := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"checksum of '{broken}' does not match")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _require_plain_pickle(archive.read(entry))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise Foreign(first_line(error)) from None


def _require_plain_pickle(content: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL" and argument not in CALLED:
            raise Foreign(f"it names '{str(argument)[:80]}'")


def require_bounded(tensors: Mapping[str, Any]) -> int:
    """Refuse tensors that claim more values than their bytes hold, and values that are no tensors.

    Returns:
        Bytes of all of them, each storage once.

    Raises:
        ValueError: Naming the first.
    """
    storages: dict[int, int] = {}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            require_plain(value)
            continue
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise ValueError(f"tensor '{name}' is no plain tensor")
        storage = value.untyped_storage()
        if value.numel() * value.itemsize > storage.nbytes():
            raise ValueError(f"tensor '{name}' claims more values than its bytes hold")
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def require_plain(value: Any) -> None:
    """Refuse what is more than mappings by name, lists, numbers, strings, true, false and none.

    Raises:
        ValueError: Also if it is nested too deep, or has too many parts.
    """
    waiting, count = [(value, 0)], 0
    while waiting:
        part, depth = waiting.pop()
        count += 1
        if count > NUM_NODES or depth > DEPTH:
            raise ValueError("it is nested too deep, or has too many parts")
        if isinstance(part, Mapping):
            if not all(isinstance(key, str) for key in part):
                raise ValueError("it has a mapping whose keys are no names")
            waiting += [(item, depth + 1) for item in part.values()]
        elif isinstance(part, list | tuple):
            waiting += [(item, depth + 1) for item in part]
        elif type(part) is int and abs(part) >= 2**63:
            raise ValueError("it holds a number of more than 64 bits")
        elif part is not None and type(part) not in (bool, int, float, str):
            raise ValueError(f"it holds a {type(part).__name__}, which is no plain data")


def digest(state: Mapping[str, Any]) -> str:
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


def first_line(error: Exception) -> str:
    """The first line of a message, or the kind of error where there is none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]

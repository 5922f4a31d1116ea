"""One safetensors file: tensors, what runs them, and a hash over all of it.

    8 bytes   length of the header, little-endian
    header    JSON: names, types, shapes and offsets of tensors; texts under `__metadata__`
    data      the tensors, one after another

The hash is SHA-256 of the whole file with its own 64 digits written as zeros. Nothing of a file is
believed before its size, its header and its hash agree. See docs/packed_format.md.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from qat import disk

FORMAT = "lowbit-packed/1"
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "U8": np.dtype("u1")}
"""Types of tensors by their name in the header."""
LARGEST_HEADER = 1 << 24
NO_HASH = "0" * 64


@dataclass(frozen=True)
class Packed:
    """What a packed file holds.

    Attributes:
        tensors: Arrays by name, read-only.
        card: What the model is: how it was built, its preprocessing, class names and plan.
        network: What runs it, see `qat.packed.network`.
    """

    tensors: dict[str, np.ndarray]
    card: dict[str, Any]
    network: dict[str, Any]


def size(packed: Packed) -> int:
    """Bytes of the file that `write` makes, header included."""
    data = sum(value.nbytes for value in packed.tensors.values())
    return 8 + len(_header(packed)) + data


def write(path: str | Path, packed: Packed) -> None:
    """Write a packed file, atomically: a reader sees the old file or the new one."""
    text = _header(packed)
    data = (np.ascontiguousarray(value).tobytes() for _, value in _ordered(packed))
    whole = b"".join([len(text).to_bytes(8, "little"), text, *data])
    disk.write(path, whole.replace(NO_HASH.encode(), digest(whole, NO_HASH).encode(), 1))


def digest(whole: bytes, found: str) -> str:
    """SHA-256 of a file whose hash is `found`."""
    return hashlib.sha256(whole.replace(found.encode(), NO_HASH.encode(), 1)).hexdigest()


def read(path: str | Path) -> Packed:
    """Read a packed file after checking every byte of it.

    Raises:
        ValueError: If it is missing, damaged, or no packed file of this version.
    """
    if not Path(path).is_file():
        raise ValueError(f"no packed file '{path}'; `train.py export --format packed` writes one")
    whole = Path(path).read_bytes()
    metadata = _metadata(path, whole)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"'{path}' is no {FORMAT} file (found format {str(metadata.get('format'))[:40]!r}); "
            "write one with `train.py export --format packed`"
        )
    found = str(metadata.get("sha256"))
    if len(found) != len(NO_HASH) or digest(whole, found) != found:
        raise ValueError(f"packed file '{path}' is damaged: its bytes do not match their hash")
    try:
        card, network = json.loads(metadata["card"]), json.loads(metadata["network"])
        tensors = {name: _array(name, found) for name, found in deserialize(whole)}
    except (KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise _damaged(path, error) from None
    if not (isinstance(card, dict) and isinstance(network, dict)):
        raise ValueError(f"packed file '{path}' has a card or network that is no mapping")
    return Packed(tensors, card, network)


def is_packed(path: str | Path) -> bool:
    """Whether a file says that it is a packed one, of whatever version; it may still be damaged."""
    try:
        with open(path, "rb") as file:
            return b'"lowbit-packed/' in file.read(256)
    except OSError:
        return False


def _ordered(packed: Packed) -> list[tuple[str, np.ndarray]]:
    """Tensors as they stand in the file: wide types first, so that all are aligned."""
    return sorted(packed.tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))


def _header(packed: Packed) -> bytes:
    """The header, its hash still zeros, filled with blanks to whole words."""
    texts = {"card": packed.card, "network": packed.network}
    metadata = {key: json.dumps(value, separators=(",", ":")) for key, value in texts.items()}
    items: dict[str, Any] = {"__metadata__": {"format": FORMAT, "sha256": NO_HASH, **metadata}}
    names = {dtype: name for name, dtype in DTYPES.items()}
    end = 0
    for name, value in _ordered(packed):
        begin, end = end, end + value.nbytes
        shape = {"dtype": names[value.dtype], "shape": list(value.shape)}
        items[name] = {**shape, "data_offsets": [begin, end]}
    text = json.dumps(items, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _metadata(path: str | Path, whole: bytes) -> dict[str, Any]:
    """The texts of the header."""
    length = int.from_bytes(whole[:8], "little")
    if len(whole) < 8 or not 2 <= length <= min(len(whole) - 8, LARGEST_HEADER):
        raise ValueError(
            f"'{path}' is truncated, or no packed file: {len(whole)} bytes do not hold its header"
        )
    try:
        found = json.loads(whole[8 : 8 + length])["__metadata__"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    return found if isinstance(found, dict) else {}


def _array(name: str, found: Mapping[str, Any]) -> np.ndarray:
    if found["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name[:80]!r} has type {found['dtype']}")
    return np.frombuffer(found["data"], DTYPES[found["dtype"]]).reshape(found["shape"])


def _damaged(path: str | Path, error: Exception) -> ValueError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return ValueError(f"'{path}' is damaged, or no packed file ({reason})")

"""Altered files: checkpoints whose bits, lengths or manifests a stranger changed."""

import random
import resource
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qat
from qat import manifest as manifests
from qat.archive import require_bounded, require_plain
from qat.checkpoint import MANIFEST
from tests.conftest import make_tiny_vit
from tests.qat.common import quantized

Content = dict[str, Any]
WRONG: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 10**18, 1.5, float("nan"), float("inf"), "", "x", "float64",
    [], [[]], [1, 2], {}, {"x": 1}, {"class_path": "os.system"}, {"items": []}, {"items": [1]},
    "qat.cli.main.main", {"class_path": "qat.quantizers.LSQ", "init_args": {"spec": 3}},
    torch.zeros(2), (1, 2), 1e-300, 65536, "../../etc", b"bytes", {1: 2},
)  # fmt: skip
SECONDS = 30
"""A case that takes longer counts as one that hangs."""


def make(path: Path) -> tuple[Tensor, Tensor]:
    """Save a tiny binary or low-bit model; images and their logits."""
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model = quantized(make_tiny_vit(depth=1, embed_dim=16, num_heads=2), images, "lsq")
    qat.save(model, path)
    return images, model(images)


def is_sealed(seed: int) -> bool:
    """Whether `altered` seals the file of a seed anew, as only a stranger does."""
    return seed % 3 == 2


def altered(path: Path, seed: int) -> bytes:
    """One altered file; a third each by bits, by lengths, and by a manifest sealed anew."""
    dice = random.Random(seed)
    content = path.read_bytes()
    match seed % 3:
        case 0:
            damaged = bytearray(content)
            for _ in range(dice.choice((1, 1, 3))):
                damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
            return bytes(damaged)
        case 1:
            cut = dice.randrange(len(content))
            junk = dice.randbytes(dice.randrange(64))
            return dice.choice((content[:cut], content[:cut] + junk, content + junk))
        case _:
            checkpoint = torch.load(path, weights_only=True)
            change(checkpoint, dice)
            return sealed(checkpoint, path)


def change(checkpoint: Content, dice: random.Random) -> None:
    """Put something else in a random place of the manifest or of the tensors."""
    if dice.random() < 0.3:
        state = checkpoint["state_dict"]
        name = dice.choice(list(state))
        state[name] = dice.choice((*WRONG, *bombs(state[name])))
        return
    places = list(_places(checkpoint[MANIFEST]))
    holder, key = dice.choice(places)
    match dice.randrange(4):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[dice.choice(("extra", "pretrained", "checkpoint_path"))] = dice.choice(WRONG)
        case _:
            holder[key] = dice.choice(WRONG)


def bombs(value: Any) -> Iterator[Any]:
    """What may stand in place of a tensor and claims more than its bytes hold."""
    yield torch.zeros(1).expand(2**34)
    yield torch.empty(2**40, device="meta")
    yield nested(100)
    yield shared(64)
    if isinstance(value, Tensor) and value.is_floating_point():
        yield from (value * torch.nan, value * 0, value.to(torch.float64), value.flatten()[:0])


def nested(depth: int) -> list[Any]:
    """A list in a list in a list."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def shared(doublings: int) -> list[Any]:
    """A list of few bytes and 2^doublings parts."""
    found: list[Any] = [1]
    for _ in range(doublings):
        found = [found, found]
    return found


def sealed(checkpoint: Content, beside: Path) -> bytes:
    """The bytes of a checkpoint, with a true hash where it can be had."""
    manifest, state = checkpoint[MANIFEST], checkpoint["state_dict"]
    with suppress(Exception):  # a bomb has no hash, which must not help it
        require_plain(manifest)
        require_bounded(state)
        manifest |= manifests.sealed(manifest, state)
    target = beside.with_name("sealed")
    torch.save(checkpoint, target)
    return target.read_bytes()


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    keys = data if isinstance(data, dict) else range(len(data))
    for key in list(keys):
        yield data, key
        if isinstance(data[key], dict | list):
            yield from _places(data[key])


def with_model(path: Path, edit: Callable[[Content], None]) -> Path:
    """A copy of a checkpoint whose recipe was edited, sealed anew."""
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint[MANIFEST])
    target = path.with_name("edited.ckpt")
    target.write_bytes(sealed(checkpoint, path))
    return target


def deflated(path: Path, size: int) -> Path:
    """An archive with a compressed entry of `size` zeros."""
    target = path.with_name("deflated.ckpt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(size) if name.endswith("data/0") else old.read(name))
    return target


def pickled(path: Path, content: bytes) -> Path:
    """An archive whose pickle is another one."""
    target = path.with_name("pickled.ckpt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return target


def call(name: str, number: int) -> bytes:
    """A pickle that calls something with a number, such as a size."""
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + b"(\x8a\x08" + struct.pack("<q", number) + b"tR."


def outcome(path: Path, images: Tensor, expected: Tensor) -> str:
    """What loading a file came to: `same`, `refused`, or what is wrong about it."""
    started = time.monotonic()
    try:
        logits = qat.load(path)(images)
    except ValueError as error:
        return "refused" if "\n" not in str(error) and len(str(error)) < 1200 else f"long: {error}"
    except BaseException as error:  # whatever escapes is the finding
        return f"{type(error).__name__}: {error}"[:200]
    finally:
        if time.monotonic() - started > SECONDS:
            return "hangs"  # noqa: B012 - it outweighs what else came of it
    return "same" if torch.equal(logits, expected) else "other logits"


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""Goals R8 and R9: no damaged state is read, no failing disk costs the last good one."""

import errno
import hashlib
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qat import disk
from qat.checkpoint import digest
from qat.tta.store import FORMAT, SLOTS, Store, pack, unpack
from tests.qat.tta.common import adapter, noisy

IDENTITY = {"model": "abc", "method": {"class_path": "qat.tta.tent.Tent"}}
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3), "c": torch.zeros(0)}


def saved(folder: Path, generations: int = 2) -> Store:
    """A store in which so many states were saved; generation g holds a * g."""
    found = Store(folder, IDENTITY)
    for generation in range(1, generations + 1):
        found.save({**TENSORS, "a": TENSORS["a"] * generation}, {"position": generation})
    return found


def test_newest_generation_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    tensors, items, problems = Store(tmp_path, IDENTITY).load()
    assert items == {"position": 3} and not problems
    assert digest(tensors) == digest({**TENSORS, "a": TENSORS["a"] * 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(SLOTS)


def test_saving_goes_on_after_loading_without_touching_the_newest(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    again = Store(tmp_path, IDENTITY)
    again.load()
    newest = (tmp_path / SLOTS[0]).read_bytes()
    again.save(TENSORS, {"position": 3})
    assert (tmp_path / SLOTS[0]).read_bytes() == newest
    assert Store(tmp_path, IDENTITY).load()[1] == {"position": 3}


def test_nothing_saved_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no saved state"):
        Store(tmp_path / "none", IDENTITY).load()


def test_thousand_bit_flips_and_truncations_are_all_refused() -> None:
    content = pack(TENSORS, {"generation": 1, "identity": IDENTITY, "items": {}})
    generator = random.Random(0)
    for _ in range(1000):
        place, bit = generator.randrange(len(content)), generator.randrange(8)
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        with pytest.raises(ValueError, match=r"damaged|it is no"):
            unpack(bytes(flipped))
        with pytest.raises(ValueError, match=r"damaged|it is no"):
            unpack(content[: generator.randrange(len(content))])
    with pytest.raises(ValueError, match="damaged"):
        unpack(content + b"\0")


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1], lambda c: b"", lambda c: c[:40] + b"x" + c[41:]]
)
def test_damaged_newest_generation_falls_back_to_the_one_before(
    tmp_path: Path, damage: Any
) -> None:
    saved(tmp_path, 2)
    newest = tmp_path / SLOTS[0]
    newest.write_bytes(damage(newest.read_bytes()))
    tensors, items, problems = Store(tmp_path, IDENTITY).load()
    assert items == {"position": 1} and torch.equal(tensors["a"], TENSORS["a"])
    assert len(problems) == 1 and problems[0].startswith(SLOTS[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "xyz"}, "another model: abc there, xyz here"),
        ({"method": {"class_path": "qat.tta.sar.SAR"}}, "another method"),
        ({"bits": 4}, "another bits: None there, 4 here"),
    ],
)
def test_state_of_another_model_or_method_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match=message):
        Store(tmp_path, {**IDENTITY, **change}).load()


def _sealed(body: bytes) -> bytes:
    return f"{FORMAT} {hashlib.sha256(body).hexdigest()}\n".encode() + body


def _swapped() -> bytes:
    content = pack({"a": torch.zeros(2), "b": torch.ones(2)}, {})
    body = content.partition(b"\n")[2]
    line, _, rest = body.partition(b"\n")
    manifest = json.loads(line)
    hashes = manifest["sha256"]
    hashes["a"], hashes["b"] = hashes["b"], hashes["a"]
    return _sealed(json.dumps(manifest).encode() + b"\n" + rest)


class Bomb:
    """What a pickle runs when it is read."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch bomb-went-off",)


HOSTILE = {
    "swapped tensors": _swapped(),
    "older format": b"lowbit-vit-stream/0 " + b"0" * 64 + b"\n{}\n",
    "pickle": pickle.dumps(Bomb()),
    "sealed pickle": _sealed(pickle.dumps(Bomb())),
    "sealed pickle as tensors": _sealed(b'{"sha256": {}}\n' + pickle.dumps(Bomb())),
    "header bomb": _sealed(b'{"sha256": {}}\n' + (2**62).to_bytes(8, "little") + b"{}"),
    "manifest is a list": _sealed(b"[]\n" + pack({}, {}).split(b"\n", 2)[2]),
    "manifest without hashes": _sealed(b"{}\n" + pack({}, {}).split(b"\n", 2)[2]),
    "manifest is no json": _sealed(b"import os\n"),
    "zip": b"PK\x03\x04" + b"0" * 100,
    "empty": b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file_is_refused_and_runs_nothing(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / SLOTS[0]).write_bytes(HOSTILE[kind])
    with pytest.raises(ValueError, match="no saved state"):
        Store(tmp_path, IDENTITY).load()
    assert not (tmp_path / "bomb-went-off").exists()


OPERATIONS = ("open", "write", "fsync", "replace")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_failing_disk_leaves_the_last_good_state_and_a_later_save_works(
    tmp_path: Path, operation: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = saved(tmp_path, 2)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    class Full:
        """A file on a full disk: half of what is written arrives."""

        def __init__(self, path: Path, mode: str) -> None:
            self.file = open(path, mode)  # noqa: SIM115

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            self.file.write(content[: len(content) // 2])
            fail()

    with monkeypatch.context() as patch:
        if operation in ("open", "write"):
            patch.setattr(disk, "open", fail if operation == "open" else Full, raising=False)
        else:
            patch.setattr(os, operation, fail)
        with pytest.raises(OSError, match=os.strerror(code)):
            tested.save(TENSORS, {"position": 3})
    assert Store(tmp_path, IDENTITY).load()[1] == {"position": 2}
    tested.save(TENSORS, {"position": 4})
    assert Store(tmp_path, IDENTITY).load()[1] == {"position": 4}


def test_tensors_that_share_memory_come_back_apart(tmp_path: Path) -> None:
    one = torch.arange(4.0)
    Store(tmp_path, IDENTITY).save({"a": one, "b": one, "c": one[:2]}, {})
    found = Store(tmp_path, IDENTITY).load()[0]
    assert torch.equal(found["a"], one) and torch.equal(found["c"], one[:2])
    found["a"].zero_()
    assert torch.equal(found["b"], one)


def test_tensor_types_survive(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {
        str(dtype): torch.tensor([0, 1, 1]).to(dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    }
    tensors["transposed"] = torch.arange(6.0).view(2, 3).T
    Store(tmp_path, IDENTITY).save(tensors, {})
    found = Store(tmp_path, IDENTITY).load()[0]
    assert digest(found) == digest({k: v.contiguous() for k, v in tensors.items()})


STRANGE: tuple[Any, ...] = (
    None, True, -1, 2**70, 1.5, float("nan"), float("inf"), "x", "", [], [1], {}, {"x": []},
)  # fmt: skip


def _altered(content: bytes, seed: int) -> bytes:
    """An altered generation: by bits, by length, or by its manifest, sealed anew."""
    dice = random.Random(seed)
    match seed % 4:
        case 0:
            damaged = bytearray(content)
            damaged[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            return bytes(damaged)
        case 1:
            return content[: dice.randrange(len(content))] + dice.randbytes(dice.randrange(9))
        case _:
            line, _, tensors = content.partition(b"\n")[2].partition(b"\n")
            manifest = json.loads(line)
            holder = dice.choice([manifest, manifest["items"], manifest["items"]["counts"]])
            key = dice.choice(list(holder))
            if dice.random() < 0.2:
                del holder[key]
            else:
                holder[key] = dice.choice(STRANGE)
            return _sealed(json.dumps(manifest).encode() + b"\n" + tensors)


def _fuzz(folder: Path, seeds: range) -> set[str]:
    """What loading altered files and continuing from them came to."""
    whole = adapter("tent")
    batches = noisy()
    whole.adapt(batches[0])
    kept = whole.state_dict()
    Store(folder, IDENTITY).save(kept["state"], {"counts": kept["counts"]})
    path, found = folder / SLOTS[1], set()
    content = path.read_bytes()
    for seed in seeds:
        path.write_bytes(_altered(content, seed))
        try:
            tensors, items, _ = Store(folder, IDENTITY).load()
            resumed = adapter("tent")
            resumed.load_state_dict({"state": tensors, **items})
        except ValueError as error:
            found.add("refused" if "\n" not in str(error) else f"{seed}: {error}")
            continue
        answered = resumed.adapt(batches[1]).logits.isfinite().all()
        found.add("answers" if answered else f"{seed}: no answer")
    return found


def test_altered_states_are_refused_in_one_line_or_answer_on(tmp_path: Path) -> None:
    assert _fuzz(tmp_path, range(24)) <= {"refused", "answers"}


@pytest.mark.slow
def test_two_hundred_altered_states_are_refused_in_one_line_or_answer_on(tmp_path: Path) -> None:
    assert _fuzz(tmp_path, range(24, 224)) <= {"refused", "answers"}


@pytest.mark.parametrize("depth", [10_000, 100_000])
def test_manifest_that_is_nested_too_deep_is_refused(depth: int) -> None:
    line = b'{"sha256": {}, "items": ' + b"[" * depth + b"]" * depth + b"}"
    with pytest.raises(ValueError, match="damaged"):
        unpack(_sealed(line + b"\n" + pack({}, {}).split(b"\n", 2)[2]))

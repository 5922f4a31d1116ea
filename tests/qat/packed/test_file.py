"""The packed file: what is damaged, foreign or hostile is refused in one line."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import qat
from binaryvit import BinaryQuantizers
from qat import runtime
from qat.export.pack import export_packed
from qat.packed import FORMAT, Packed, is_packed, read, size, write
from qat.packed.file import NO_HASH, digest
from tests.conftest import make_tiny_vit
from tests.qat.common import plan

Change = Callable[[Packed], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A packed file of a tiny binary model."""
    model = make_tiny_vit(depth=1)
    qat.convert_(model, plan(1), BinaryQuantizers())
    qat.set_phase(model, qat.Phase.QUANTIZE)
    path = tmp_path_factory.mktemp("packed") / "model.lowbit"
    export_packed(model, path)
    return path.read_bytes()


def _refused(path: Path, whole: bytes) -> str:
    """The one line with which both readers refuse a file."""
    path.write_bytes(whole)
    for load in (runtime.load, qat.load):
        with pytest.raises(ValueError) as caught:
            load(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def _changed(whole: bytes, path: Path, change: Change) -> bytes:
    """The file with something in it changed, under a hash that is right."""
    path.write_bytes(whole)
    packed = read(path)
    change(packed)
    write(path, packed)
    return path.read_bytes()


def test_a_file_of_tensors_card_and_network_comes_back(tmp_path: Path) -> None:
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([1, 2, 3], np.uint8),
        "c": np.array(0.5, np.float16),
    }
    packed = Packed(tensors, {"model": {"name": "x"}}, {"depth": 1})
    write(tmp_path / "f", packed)
    found = read(tmp_path / "f")
    assert found.card == packed.card and found.network == packed.network
    for name, value in tensors.items():
        assert found.tensors[name].dtype == value.dtype
        assert (found.tensors[name] == value).all()
    assert size(packed) == (tmp_path / "f").stat().st_size
    assert is_packed(tmp_path / "f") and not is_packed(tmp_path / "absent")


def test_every_byte_of_the_file_is_under_the_hash(whole: bytes, tmp_path: Path) -> None:
    for place in np.linspace(0, len(whole) - 1, 97).astype(int):
        changed = bytearray(whole)
        changed[place] ^= 1
        _refused(tmp_path / "f", bytes(changed))


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(whole: bytes, share: float, tmp_path: Path) -> None:
    _refused(tmp_path / "f", whole[: int(len(whole) * share)])


def test_foreign_files_are_refused(whole: bytes, tmp_path: Path) -> None:
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "foreign", {"format": "pt"})
    with pytest.raises(ValueError, match=f"no {FORMAT} file .found format 'pt'."):
        runtime.load(tmp_path / "foreign")
    newer = whole.replace(FORMAT.encode(), b"lowbit-packed/9", 1)
    assert "found format 'lowbit-packed/9'" in _refused(tmp_path / "f", newer)
    with pytest.raises(ValueError, match="no packed file"):
        runtime.load(tmp_path / "absent")


HOSTILE: dict[str, Change] = {
    "depth": lambda p: p.network.update(depth=4096),
    "huge depth": lambda p: p.network.update(depth=10**12),
    "no heads": lambda p: p.network.update(heads=0),
    "uneven heads": lambda p: p.network.update(heads=7),
    "huge image": lambda p: p.network.update(image=[1, 10**9, 10**9]),
    "many patches": lambda p: p.network.update(image=[1, 4096, 4096], patch=[1, 1]),
    "image of another size": lambda p: p.network.update(image=[1, 16, 16]),
    "no patch": lambda p: p.network.update(patch=[0, 2]),
    "pool": lambda p: p.network.update(pool="map"),
    "eps": lambda p: p.network.update(eps="1e-6"),
    "operands": lambda p: p.network.update(operands=[]),
    "form": lambda p: p.network["operands"]["blocks.0.mlp.fc1"].update(weight="b99"),
    "another form": lambda p: p.network["operands"]["blocks.0.mlp.fc1"].update(weight="u4"),
    "wide form": lambda p: p.network["operands"]["blocks.0.mlp.fc1"].update(input="s99"),
    "operand": lambda p: p.network["operands"]["blocks.0.mlp.fc1"].update(bias="u4"),
    "prefix": lambda p: p.network.update(prefix=["head.weight"]),
    "absent prefix": lambda p: p.network.update(prefix=["nothing"]),
    "react": lambda p: p.network.update(react=["blocks.0.mlp.fc1"]),
    "context": lambda p: p.network.update(context=["blocks.0.attn"]),
    "no network": lambda p: p.network.clear(),
    "nan": lambda p: p.network.update(eps=float("nan")),
    "no tensor": lambda p: p.tensors.__delitem__("norm.weight") or None,
    "no codes": lambda p: p.tensors.__delitem__("blocks.0.mlp.fc1.weight") or None,
    "short codes": lambda p: p.tensors.update(
        {"blocks.0.mlp.fc1.weight": np.zeros((256, 1), np.uint8)}
    ),
    "float codes": lambda p: p.tensors.update(
        {"blocks.0.mlp.fc1.weight": np.zeros((256, 64), np.float32)}
    ),
    "scale": lambda p: p.tensors.update(
        {"blocks.0.mlp.fc1.weight_quantizer.scale": np.zeros(3, np.float32)}
    ),
    "threshold": lambda p: p.tensors.update(
        {"blocks.0.mlp.fc1.input_quantizer.shift.shift": np.zeros(3, np.float32)}
    ),
    "threshold of products": lambda p: p.tensors.update(
        {"blocks.0.attn.qk.left_quantizer.shift.shift": np.zeros((1, 1, 1), np.float32)}
    ),
    "positions": lambda p: p.tensors.update({"pos_embed": np.zeros((1, 3, 64), np.float32)}),
    "byte positions": lambda p: p.tensors.update({"pos_embed": np.zeros((1, 17, 64), np.uint8)}),
    "bias": lambda p: p.tensors.update({"blocks.0.mlp.fc1.bias": np.zeros(3, np.float32)}),
    "scalar weight": lambda p: p.tensors.update({"head.weight": np.array(1, np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE)
def test_a_file_that_contradicts_itself_is_refused(
    whole: bytes, change: str, tmp_path: Path
) -> None:
    """Under a hash that is right, before anything of the sizes it claims is made."""
    _refused(tmp_path / "f", _changed(whole, tmp_path / "f", HOSTILE[change]))


CARDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "builder": lambda card: card.update(model={"class_path": "os.system"}),
    "model": lambda card: card["model"].update(name="no_such_model"),
    "argument": lambda card: card["model"].update(model_args={"depth": -1}),
    "factory": lambda card: card["conversion"].update(make_quantizer={"class_path": "os.system"}),
    "plan": lambda card: card["conversion"].update(plan=[]),
    "nothing": lambda card: card.clear(),
    "float": lambda card: card.update(conversion=None),
}


@pytest.mark.parametrize("change", CARDS)
def test_a_card_that_fits_no_model_is_refused_by_the_reader_in_torch(
    whole: bytes, change: str, tmp_path: Path
) -> None:
    _changed(whole, tmp_path / "f", lambda packed: CARDS[change](packed.card))
    with pytest.raises(ValueError) as caught:
        qat.load(tmp_path / "f")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "preprocessing",
    [None, {}, {"crop_pct": 1e-9}, {"interpolation": "magic"}, {"std": [0.0]}, {"mean": [1, 2]},
     {"input_size": [1, 9, 9]}, {"crop_mode": "squash"}],
)  # fmt: skip
def test_preprocessing_that_the_runtime_does_not_know_is_refused_at_prediction(
    whole: bytes, preprocessing: dict[str, Any] | None, tmp_path: Path
) -> None:
    def change(packed: Packed) -> None:
        known = packed.card["preprocessing"]
        packed.card["preprocessing"] = preprocessing and {**known, **preprocessing}

    _changed(whole, tmp_path / "f", change)
    model = runtime.load(tmp_path / "f")
    assert model(np.zeros((1, 1, 8, 8), np.float32)).shape == (1, 10)
    if preprocessing == {}:
        return
    with pytest.raises(ValueError, match="no preprocessing that this runtime knows"):
        model.predict(["any.png"])


def _file(header: bytes, data: bytes = b"") -> bytes:
    """A file of any header under a hash that is right."""
    whole = struct.pack("<Q", len(header)) + header + data
    return whole.replace(NO_HASH.encode(), digest(whole, NO_HASH).encode(), 1)


def _header(**items: Any) -> bytes:
    texts = {"format": FORMAT, "sha256": NO_HASH, "card": "{}", "network": "{}"}
    return json.dumps({"__metadata__": {**texts, **items.pop("texts", {})}, **items}).encode()


HUGE = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
HEADERS = {
    "a tensor larger than the file": _header(x=HUGE),
    "a tensor of an unknown type": _header(x={"dtype": "Q9", "shape": [0], "data_offsets": [0, 0]}),
    "overlapping tensors": _header(
        x={"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        y={"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
    ),
    "a shape below zero": _header(x={"dtype": "U8", "shape": [-4], "data_offsets": [0, 4]}),
    "a tensor of 64 bits": _header(x={"dtype": "F64", "shape": [0], "data_offsets": [0, 0]}),
    "texts that are no JSON": _header(texts={"card": "{"}),
    "texts that are no mapping": _header(texts={"network": "[]"}),
    "texts nested deeply": _header(texts={"card": "[" * 100_000}),
    "numbers of many digits": _header(texts={"card": "9" * 10_000}),
    "no texts": _header(texts={"card": None}),
}  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_a_hostile_header_is_refused(header: str, tmp_path: Path) -> None:
    _refused(tmp_path / "f", _file(HEADERS[header], b"\0" * 8))


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b'{"__metadata__":{"format":"lowbit-packed/1"}}')
    for load in (runtime.load, qat.load):
        with pytest.raises(ValueError, match="truncated, or no packed file"):
            load(path)


@pytest.mark.slow
def test_random_damage_under_a_right_hash_gives_one_line_or_a_working_model(
    whole: bytes, tmp_path: Path
) -> None:
    """Fuzz: bytes of the header changed at random, the hash made right again."""
    chance = random.Random(0)
    length = struct.unpack("<Q", whole[:8])[0]
    blank = whole.replace(read_hash(whole), NO_HASH.encode(), 1)
    for _ in range(3000):
        header = bytearray(blank[8 : 8 + length])
        for _ in range(chance.choice((1, 1, 2, 8))):
            header[chance.randrange(len(header))] = chance.choice(b'0123456789"{}[]:,.-etx ')
        damaged = whole[:8] + bytes(header) + whole[8 + length :]
        damaged = damaged.replace(NO_HASH.encode(), digest(damaged, NO_HASH).encode(), 1)
        path = tmp_path / "f"
        path.write_bytes(damaged)
        try:
            model = runtime.load(path)
            model(np.zeros((1, *model.network.image), np.float32))
        except ValueError as error:
            assert "\n" not in str(error)


def read_hash(whole: bytes) -> bytes:
    """The hash that stands in a file."""
    length = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8 : 8 + length])["__metadata__"]["sha256"].encode()

"""Checkpoints: the same bits in another process, or an error; never other bits, never code."""

import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import timm
import torch
from torch import Tensor, nn

import qat
from qat import Plan
from qat.card import amend
from qat.checkpoint import MANIFEST, digest, manifest, read, require_same
from qat.manifest import OLDER, WINDOWS, sealed
from qat.preprocessing import Preprocessing
from qat.quantizers import LSQ, Affine, quantizers
from tests.conftest import make_tiny_vit
from tests.qat.common import plan, quantized, swin

ROOT = Path(__file__).parents[2]
KINDS = ("teacher", "lsq", "affine", "react")
LOAD = """
import sys
import torch
import qat

images, *paths = sys.argv[1:]
images = torch.load(images)
torch.save([qat.load(path)(images) for path in paths], sys.stdout.buffer)
"""


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


def local_factory(spec: qat.QuantSpec, shape: tuple[int, ...], operand: qat.Operand) -> LSQ:
    return LSQ(spec, shape, operand)


def _model(kind: str, images: Tensor) -> nn.Module:
    model = make_tiny_vit()
    return model if kind == "teacher" else quantized(model, images, kind)


def _rewritten(path: Path, change: Callable[[dict[str, Any]], None], again: bool = False) -> Path:
    """The file changed, with a new seal where asked."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    if again:
        content = checkpoint[MANIFEST]
        content |= sealed(content, checkpoint["state_dict"])
    torch.save(checkpoint, path)
    return path


@pytest.fixture
def saved(tiny_vit: nn.Module, images: Tensor, tmp_path: Path) -> Path:
    """A checkpoint of a calibrated LSQ model."""
    path = tmp_path / "model.ckpt"
    qat.save(quantized(tiny_vit, images, "lsq"), path)
    return path


def test_logits_are_bit_identical_in_a_new_process(images: Tensor, tmp_path: Path) -> None:
    models = [_model(kind, images) for kind in KINDS]
    with torch.no_grad():  # away from the starting values
        for parameter in (parameter for model in models for parameter in model.parameters()):
            parameter.add_(0.01 * torch.rand_like(parameter))
    paths = [tmp_path / f"{kind}.ckpt" for kind in KINDS]
    for model, path in zip(models, paths, strict=True):
        qat.save(model, path)
    torch.save(images, tmp_path / "images")
    command = [sys.executable, "-c", LOAD, tmp_path / "images", *paths]
    result = subprocess.run(command, capture_output=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    (tmp_path / "logits").write_bytes(result.stdout)
    for found, model in zip(torch.load(tmp_path / "logits"), models, strict=True):
        assert torch.equal(found, model(images))


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_model_has_plan_phases_preprocessing_class_names_and_evaluation_mode(
    kind: str, images: Tensor, tmp_path: Path
) -> None:
    model = _model(kind, images).train()
    amend(
        model,
        preprocessing=Preprocessing((1, 8, 8), (0.1,), (0.2,), "nearest", 0.9, "center"),
        class_names=tuple("abcdefghij"),
    )
    qat.save(model, tmp_path / "model.ckpt")
    loaded = qat.load(tmp_path / "model.ckpt")
    assert loaded.card.preprocessing == model.card.preprocessing
    assert loaded.card.class_names == tuple("abcdefghij")
    assert not any(module.training for module in loaded.modules())
    assert {found.phase for _, found in quantizers(loaded)} <= {qat.Phase.QUANTIZE}
    if kind != "teacher":
        assert loaded.card.conversion == model.card.conversion
    qat.save(loaded, tmp_path / "again.ckpt")
    assert read(tmp_path / "again.ckpt")[MANIFEST] == read(tmp_path / "model.ckpt")[MANIFEST]


def test_model_inside_a_training_checkpoint_is_loaded_by_its_prefix(
    images: Tensor, tmp_path: Path
) -> None:
    model = _model("lsq", images)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state["teacher.weight"] = torch.zeros(3)
    checkpoint = {MANIFEST: manifest(model, state, "model."), "state_dict": state, "epoch": 3}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    assert torch.equal(qat.load(tmp_path / "last.ckpt")(images), model(images))


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file_is_refused(kept: float, saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"'.*model\.ckpt' is truncated or damaged"):
        qat.load(saved)


def test_every_flipped_bit_of_tensor_data_is_noticed(saved: Path) -> None:
    content = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        records = [info for info in archive.infolist() if "/data/" in info.filename]
        starts = {info.filename: content.index(archive.read(info)) for info in records}
    dice = random.Random(0)
    for record in dice.choices(records, weights=[info.file_size for info in records], k=20):
        damaged = bytearray(content)
        at = starts[record.filename] + dice.randrange(record.file_size)
        damaged[at] ^= 1 << dice.randrange(8)
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match="is truncated or damaged"):
            read(saved)


def test_flipped_bit_anywhere_never_gives_other_logits(saved: Path, images: Tensor) -> None:
    expected = qat.load(saved)(images)
    content, dice = saved.read_bytes(), random.Random(1)
    headers = [dice.randrange(300) for _ in range(6)]
    directory = [len(content) - 1 - dice.randrange(3000) for _ in range(6)]
    for at in (*headers, *directory):
        damaged = bytearray(content)
        damaged[at] ^= 1 << dice.randrange(8)
        saved.write_bytes(damaged)
        try:
            logits = qat.load(saved)(images)
        except ValueError:
            continue
        assert torch.equal(logits, expected), at


def test_tensors_that_do_not_match_their_hash_are_refused(saved: Path) -> None:
    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["head.bias"][0] += 1

    with pytest.raises(ValueError, match="its tensors do not match their hash"):
        qat.load(_rewritten(saved, change))


def test_phase_that_does_not_match_the_hash_is_refused(saved: Path) -> None:
    def change(checkpoint: dict[str, Any]) -> None:
        name = "blocks.0.attn.qkv.weight_quantizer._extra_state"
        checkpoint["state_dict"][name] = {"phase": "float"}

    with pytest.raises(ValueError, match="its tensors do not match their hash"):
        qat.load(_rewritten(saved, change))


def test_digest_covers_names_types_shapes_and_bits() -> None:
    base = {"a": torch.zeros(2, 3)}
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": -torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3), "b": 1},
    ]
    assert len({digest(state) for state in (base, *others)}) == 6
    transposed = torch.zeros(3, 2).T  # another layout in memory, the same values
    assert digest({"a": transposed}) == digest(base)


def test_model_that_does_not_fit_its_tensors_is_refused_with_the_versions(saved: Path) -> None:
    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint[MANIFEST]["model"]["num_classes"] = 3

    with pytest.raises(ValueError, match=rf"does not fit the model .*head.*{timm.__version__}"):
        qat.load(_rewritten(saved, change, again=True))


@pytest.mark.parametrize(
    "content",
    [{"state_dict": {}}, [1, 2], torch.zeros(3), {MANIFEST: {"format": "other/2"}}],
    ids=["state-dict", "list", "tensor", "other-format"],
)
def test_torch_file_of_another_program_is_refused_with_where_it_goes(
    content: object, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "foreign.pth")
    with pytest.raises(
        ValueError,
        match=r"is no lowbit-vit/2 checkpoint: it (holds no man.*`weights` se|says format 'oth)",
    ):
        qat.load(tmp_path / "foreign.pth")


@pytest.mark.parametrize("where", ["manifest", "state_dict", "beside"])
def test_pickled_code_never_runs(where: str, saved: Path, tmp_path: Path) -> None:
    payload = Payload(tmp_path / "payload-ran")

    def change(checkpoint: dict[str, Any]) -> None:
        holder = {"manifest": checkpoint[MANIFEST], "beside": checkpoint}
        holder.get(where, checkpoint["state_dict"])["evil"] = payload

    with pytest.raises(ValueError, match="holds Python code"):
        qat.load(_rewritten(saved, change))
    assert not (tmp_path / "payload-ran").exists()


def test_archive_whose_pickle_is_empty_is_refused(saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(saved, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, b"" if name.endswith("data.pkl") else data)
    with pytest.raises(ValueError, match="is truncated or damaged"):
        qat.load(saved)


@pytest.mark.parametrize("key", ["make_quantizer", "handlers"])
def test_file_that_names_untrusted_code_is_refused(key: str, saved: Path) -> None:
    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint[MANIFEST]["conversion"][key] = {"class_path": "os.system"}

    with pytest.raises(ValueError, match=r"os\.system|field 'items'"):
        qat.load(_rewritten(saved, change, again=True))


def test_factory_of_the_caller_is_loaded_only_with_trust(
    tiny_vit: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_quantizers.py").write_text(
        "from qat.quantizers import LSQ\nclass Mine(LSQ): ..."
    )
    monkeypatch.syspath_prepend(tmp_path)
    import own_quantizers

    qat.convert_(tiny_vit, plan(), own_quantizers.Mine)
    qat.save(tiny_vit, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"names 'own_quantizers\.Mine'.*trust="):
        qat.load(tmp_path / "model.ckpt")
    loaded = qat.load(tmp_path / "model.ckpt", trust=("own_quantizers",))
    assert torch.equal(loaded(images), tiny_vit(images))


def test_factory_without_a_name_is_refused_at_save_and_the_old_file_stays(
    tiny_vit: nn.Module, saved: Path
) -> None:
    before = saved.read_bytes()
    model = make_tiny_vit()
    qat.convert_(model, plan(), lambda spec, shape, operand: LSQ(spec, shape, operand))
    with pytest.raises(ValueError, match=r"cannot store <function .*lambda"):
        qat.save(model, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_model_argument_that_would_make_the_file_unreadable_is_refused_at_save(
    tmp_path: Path,
) -> None:
    model = make_tiny_vit(norm_layer=nn.LayerNorm)
    with pytest.raises(ValueError, match="norm_layer"):
        qat.save(model, tmp_path / "model.ckpt")


def test_model_of_another_builder_is_refused_with_the_builder_to_use(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    with pytest.raises(ValueError, match=r"the model has no card.*qat\.timm_model.*qat\.adopt"):
        qat.save(model, tmp_path / "model.ckpt")
    assert not list(tmp_path.iterdir())


def test_save_that_fails_on_the_way_leaves_the_old_file_intact(
    saved: Path, tiny_vit: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(_: object, file: BinaryIO) -> None:
        file.write(b"half a fi")
        raise OSError("No space left on device")

    expected = tiny_vit(images)
    with torch.no_grad():
        tiny_vit.head.bias.add_(1)
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        qat.save(tiny_vit, saved)
    assert torch.equal(qat.load(saved)(images), expected)


def test_missing_file_says_what_would_write_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint '.*'; expected a file from fit"):
        qat.load(tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize("part", ["model", "preprocessing", "conversion"])
def test_checkpoint_of_another_model_is_refused_by_the_part_that_differs(
    part: str, images: Tensor
) -> None:
    ours, theirs = make_tiny_vit(), make_tiny_vit(depth=1 if part == "model" else 2)
    if part == "preprocessing":
        amend(theirs, preprocessing=replace(theirs.card.preprocessing, mean=(0.1,)))
    qat.convert_(ours, plan(), LSQ)
    qat.convert_(theirs, plan(), Affine if part == "conversion" else LSQ)
    found = [manifest(model, model.state_dict()) for model in (theirs, ours)]
    require_same(found[1], found[1])
    with pytest.raises(
        ValueError, match=rf"holds another {part} than the recipe asks for: .* here"
    ):
        require_same(*found)


OLD_PAIR = {
    "class_path": "qat.convert.Handler",
    "init_args": {
        "build": {"class_path": "qat.convert.quant_attention"},
        "operands": ["query", "key", "attention", "value"],
    },
}


def _as_written_before(path: Path) -> None:
    """A file of format 1, with handlers named as when attention had twins of its own."""
    content = torch.load(path, weights_only=True)
    older = content[MANIFEST]
    del older["dtype"], older["class_names"], older["tensors"]
    older |= {"format": OLDER, "sha256": digest(content["state_dict"])}
    handlers = older["conversion"]["handlers"]
    linear = [pair for pair in handlers["items"] if pair[0]["class_path"].endswith("Linear")]
    attention = [{"class_path": name} for name in ("timm.layers.attention.Attention", WINDOWS)]
    handlers["items"] = [*linear, *([kind, OLD_PAIR] for kind in attention)]
    torch.save(content, path)


def test_file_from_before_products_were_intercepted_gives_the_same_logits(
    tiny_vit: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    quantized(tiny_vit, images, "lsq")
    qat.save(tiny_vit, tmp_path / "model.ckpt")
    _as_written_before(tmp_path / "model.ckpt")
    assert torch.equal(qat.load(tmp_path / "model.ckpt")(images), tiny_vit(images))


def test_swin_from_before_is_refused_since_its_queries_were_quantized_unscaled(
    tmp_path: Path,
) -> None:
    model = swin()
    qat.convert_(model, Plan.from_list([{"pattern": "*.attn", "query": {"bits": 4}}]), LSQ)
    qat.save(model, tmp_path / "swin.ckpt")
    _as_written_before(tmp_path / "swin.ckpt")
    with pytest.raises(ValueError, match=r"holds a Swin whose queries .* train the float model"):
        qat.load(tmp_path / "swin.ckpt")

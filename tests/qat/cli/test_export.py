"""`export`, and what reads an exported file: `test`, `predict`."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import qat
from qat.card import amend
from qat.export.pack import packed_bytes
from qat.packed import read, write
from tests.runs import metrics, run


@pytest.fixture(scope="module")
def exported(binary_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the export of a binary student, by the recipe kept beside it."""
    folder = tmp_path_factory.mktemp("exports") / "export"
    words = ("--ckpt_path", binary_run / "checkpoints" / "last.ckpt", "--run_dir", folder)
    assert run("export", "--format", "packed", "--verify", *words) == 0
    return folder


@pytest.fixture(scope="module")
def onnx_file(binary_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same student as an ONNX file, with the checkpoint given by the short flag."""
    folder = tmp_path_factory.mktemp("exports") / "onnx"
    words = ("--model", binary_run / "checkpoints" / "last.ckpt", "--run_dir", folder)
    assert run("export", "--format", "onnx", "--verify", "40", *words) == 0
    return folder / "model.onnx"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images below a folder, and a file that only looks like one."""
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "inner/c.png")):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 11), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "x.png").write_bytes(b"no image")
    return folder


def test_export_compares_on_every_evaluation_image_and_says_what_it_saves(
    exported: Path, binary_run: Path
) -> None:
    found = metrics(exported)
    model = qat.load(binary_run / "checkpoints" / "last.ckpt")
    assert found["size_bytes"] == (exported / "model.lowbit").stat().st_size == packed_bytes(model)
    assert found["size_float_bytes"] > 7 * found["size_bytes"]
    assert found["n_images"] == 360 and found["agreement"] == 1.0
    assert found["n_codes_wrong"] == 0 == found["n_faults"]
    assert found["logit_gap_median"] <= found["logit_gap"]
    assert found["seconds_per_image"] > 0 < found["seconds_per_image_float"]
    assert {"coverage_macs", "bops", "command", "recipe", "seed", "device"} <= set(found)


def test_plan_predicts_the_bytes_of_the_file(
    exported: Path, binary_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the checkpoint, and from the recipe, whose model has yet to be trained."""
    said = f"packed file: {metrics(exported)['size_bytes']:,} bytes"
    assert run("plan", "--ckpt_path", binary_run / "checkpoints" / "last.ckpt") == 0
    assert said in capsys.readouterr().out
    model = qat.load(exported / "model.lowbit")
    amend(model, class_names=None)
    assert run("plan", "--config", "configs/default.yaml") == 0
    said = f"packed file: {packed_bytes(model):,} bytes, its header included, before names"
    assert said in capsys.readouterr().out


def test_fit_exports_where_the_recipe_says_so(binary_run: Path) -> None:
    found = metrics(binary_run)
    assert found["size_packed_bytes"] == (binary_run / "model.lowbit").stat().st_size
    assert found["agreement_packed"] == 1.0 and found["n_faults_packed"] == 0


def test_test_reads_a_packed_file(exported: Path, binary_run: Path, tmp_path: Path) -> None:
    words = ("--ckpt_path", exported / "model.lowbit", "--run_dir", tmp_path / "run")
    assert run("test", *words) == 0
    assert metrics(tmp_path / "run")["top1"] == metrics(binary_run)["top1"]


def test_an_onnx_file_says_what_it_saves_and_how_many_products_run_on_integers(
    onnx_file: Path,
) -> None:
    found = metrics(onnx_file.parent)
    assert found["size_bytes"] == onnx_file.stat().st_size < found["size_float_bytes"]
    assert found["n_images"] == 40 and found["agreement"] == 1.0
    assert found["n_codes_wrong"] == 0 == found["n_faults"]
    assert 0 < found["n_products_int_onnxruntime"] < found["n_products"]


def test_test_and_predict_read_an_onnx_file(
    onnx_file: Path, binary_run: Path, photos: Path, tmp_path: Path
) -> None:
    """With the answers of the checkpoint and its costs."""
    words = ("--config", binary_run / "config.yaml", "--ckpt_path", onnx_file)
    assert run("test", *words, "--run_dir", tmp_path / "run") == 0
    found, own = metrics(tmp_path / "run"), metrics(binary_run)
    assert {key: found[key] for key in ("top1", "bops")} == {
        key: own[key] for key in ("top1", "bops")
    }
    rows = {}
    for path in (onnx_file, binary_run / "checkpoints" / "last.ckpt"):
        words = ("--ckpt_path", path, "--images", photos, "--run_dir", tmp_path / path.stem)
        assert run("predict", *words) == 0
        with open(tmp_path / path.stem / "predictions.csv", newline="") as file:
            rows[path.stem] = [(row["image"], row["class"]) for row in csv.DictReader(file)]
    assert rows["model"] == rows["last"]


def test_predict_gives_the_same_answers_by_checkpoint_and_packed_file(
    exported: Path, binary_run: Path, photos: Path, tmp_path: Path
) -> None:
    rows = {}
    for path in (exported / "model.lowbit", binary_run / "checkpoints" / "last.ckpt"):
        folder = tmp_path / path.stem
        words = ("--ckpt_path", path, "--images", photos, "--run_dir", folder)
        assert run("predict", *words) == 0
        with open(folder / "predictions.csv", newline="") as file:
            rows[path.stem] = list(csv.DictReader(file))
        found = metrics(folder)
        assert (found["n_images"], found["n_refused"], found["n_labelled"]) == (4, 1, 0)
    packed, simulated = rows["model"], rows["last"]
    assert [row["image"] for row in packed] == ["a.png", "b.png", "inner/c.png", "x.png"]
    for one, other in zip(packed, simulated, strict=True):
        assert (one["class"], one["index"]) == (other["class"], other["index"])
        if one["index"]:
            assert float(one["confidence"]) == pytest.approx(float(other["confidence"]), abs=1e-5)
    assert "cannot be read" in packed[-1]["refused"] and not packed[-1]["class"]


def test_export_compares_on_a_folder_of_images_and_states_the_gap_of_half_precision(
    exported: Path, binary_run: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "x.png").unlink()
    words = ("--ckpt_path", binary_run / "checkpoints" / "last.ckpt", "--run_dir", tmp_path / "run")
    assert run("export", *words, "--half", "true", "--verify", "2", "--images", photos) == 0
    found = metrics(tmp_path / "run")
    assert found["n_images"] == 2 and found["n_faults"] == 0
    assert found["size_bytes"] < metrics(exported)["size_bytes"]
    assert found["logit_gap_half"] >= found["logit_gap"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("export",), "nothing to export"),
        (("predict", "--images", "{photos}"), "nothing to predict with"),
        (("predict", "--ckpt_path", "{model}", "--images", "nowhere"), "nowhere"),
        (("predict", "--ckpt_path", "absent.ckpt", "--images", "{photos}"), "no checkpoint"),
        (("export", "--ckpt_path", "{model}", "--format", "zip"), "format"),
        (
            ("export", "--ckpt_path", "{model}", "--format", "onnx", "--half", "true"),
            "packed files",
        ),
        (("predict", "--ckpt_path", "absent.onnx", "--images", "{photos}"), "no ONNX file"),
        (("export", "--ckpt_path", "{onnx}", "--format", "onnx"), "is an ONNX file"),
        (("test", "--ckpt_path", "{damaged}"), "is damaged"),
        (("predict", "--ckpt_path", "{damaged}", "--images", "{photos}"), "is damaged"),
    ],
)
def test_a_mistake_is_one_line(
    words: tuple[str, ...],
    said: str,
    exported: Path,
    onnx_file: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = exported / "damaged.lowbit"
    damaged.write_bytes((exported / "model.lowbit").read_bytes()[:-9] + b"123456789")
    places = {
        "model": exported / "model.lowbit",
        "photos": photos,
        "damaged": damaged,
        "onnx": onnx_file,
    }
    recipe = () if words != ("export",) else ("--config", "configs/digits_teacher.yaml")
    status = run(
        *(word.format(**places) for word in (*words, *recipe)), "--run_dir", tmp_path / "r"
    )
    line = capsys.readouterr().err.strip()
    assert status != 0 and line.startswith("error: ") and "\n" not in line and said in line
    assert not (tmp_path / "r").exists()


def test_a_packed_file_that_computes_something_else_fails_the_export(
    binary_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def wrong(path: Path, packed: Any) -> None:
        tensors = dict(packed.tensors)
        tensors["blocks.1.norm1.bias"] = tensors["blocks.1.norm1.bias"] + np.float32(0.5)
        write(path, type(packed)(tensors, packed.card, packed.network))

    monkeypatch.setattr("qat.export.pack.write", wrong)
    words = ("--ckpt_path", binary_run / "checkpoints" / "last.ckpt", "--run_dir", tmp_path / "run")
    assert run("export", *words, "--verify", "8") == 1
    assert "blocks.1.attn.qkv.input_quantizer" in capsys.readouterr().err
    assert metrics(tmp_path / "run")["n_faults"] == 8


@pytest.mark.slow
def test_a_packed_file_is_exported_again_to_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    words = ("--ckpt_path", exported / "model.lowbit", "--run_dir", tmp_path / "run")
    assert run("export", *words) == 0
    again = tmp_path / "run" / "model.lowbit"
    assert again.read_bytes() == (exported / "model.lowbit").read_bytes()
    tensors = read(again).tensors
    assert torch.is_tensor(qat.load(again).state_dict()["pos_embed"]) and "pos_embed" in tensors

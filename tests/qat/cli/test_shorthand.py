"""Few words: one's own model and photos without a class path."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import qat
from qat.cli.recipe import load_recipe
from qat.cli.shorthand import spelled_out
from tests import runs
from tests.conftest import make_tiny_vit


def _photos(root: Path, classes: tuple[str, ...], count: int = 8) -> Path:
    """Noise around the brightness of each class, in a folder for each."""
    random = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 100, (8, 8)) + 100 * number
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return _photos(tmp_path / "photos", ("dark", "light"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    qat.save(make_tiny_vit(), tmp_path / "float.ckpt")
    return str(tmp_path / "float.ckpt")


def _spelled(command: str, *words: str) -> dict[str, Any]:
    found = spelled_out(command, list(words))
    values = (json.loads(x) if x[0] in '{["' or x == "null" else x for x in found[1::2])
    return dict(zip((key[2:] for key in found[::2]), values, strict=True))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_base_patch16_224.augreg_in21k"])
def test_model_is_a_name_of_timm(name: str) -> None:
    component = {"class_path": "qat.timm_model", "init_args": {"name": name}}
    assert _spelled("quantize", "--model", name) == {"model.model": component}
    assert _spelled("fit", f"--model.model={name}") == {"model.model": component}


def test_model_is_a_checkpoint_which_fit_trains_and_the_others_start_from(checkpoint: str) -> None:
    loading = {"class_path": "qat.load", "init_args": {"path": checkpoint}}
    assert _spelled("fit", "--model", checkpoint) == {"model.model": loading}
    assert _spelled("quantize", "--model", checkpoint) == {"ckpt_path": checkpoint}


@pytest.mark.parametrize("command", ["fit", "predict"])
@pytest.mark.parametrize("name", ["absent.ckpt", "runs/absent.lowbit", "absent.safetensors"])
def test_file_that_is_not_there_is_named_as_a_file(
    command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.run(command, "--model", name) == 2
    assert f"error: no file '{name}'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/absent", "absent/photos"])
def test_folder_that_is_not_there_is_named_as_a_folder(
    name: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--config", "qat/photos", "--model", checkpoint, "--data", name)
    assert runs.run("fit", *words) != 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: image folder '{name}' cannot be read")


def test_class_path_and_plain_data_are_left_to_the_parser() -> None:
    for value in ("my.package.build", '{"class_path": "my.package.build"}', "null"):
        words = ["--model.model", value]
        assert spelled_out("fit", words) == words
    assert spelled_out("fit", ["--config", "default"]) == ["--config", "default"]


def test_strings_of_a_recipe_stand_for_models_and_folders(photos: Path) -> None:
    recipe = {"model": {"model": "resnet18"}, "data": {"train": str(photos), "val": "a.b.source"}}
    found = load_recipe(recipe)
    assert found["model"]["model"] == {
        "class_path": "qat.timm_model",
        "init_args": {"name": "resnet18"},
    }
    assert found["data"]["train"]["class_path"] == "qat.data.sources.image_folder"
    assert found["data"]["val"] == "a.b.source"


def test_folder_of_photos_trains_a_model_of_their_classes(tmp_path: Path, photos: Path) -> None:
    """The number of classes is nobody's business but the folder's."""
    tiny = ("--model.model.init_args.img_size", "8", "--model.model.init_args.in_chans", "1")
    shape = ("--model.model.init_args.model_args", json.dumps(runs.TINY))
    words = ("--config", "qat/photos", "--model", "vit_tiny_patch16_224", "--data", photos)
    run = ("--run_dir", tmp_path / "run", "--data.batch_size", 4, "--trainer.max_epochs", 1)
    assert runs.run("fit", *words, *tiny, *shape, *run) == 0
    model = qat.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert model.num_classes == 2
    assert model.card.class_names == ("dark", "light")  # type: ignore[union-attr]


def test_photos_without_labels_calibrate_and_give_agreement_but_no_accuracy(
    tmp_path: Path, photos: Path, checkpoint: str
) -> None:
    words = ("--config", "ptq/repq", "--model", checkpoint, "--images", photos, "--bits", "w8a8")
    run = ("--run_dir", tmp_path / "run", "--data.num_calibration", 4)
    assert runs.run("quantize", *words, *run) == 0
    found = runs.metrics(tmp_path / "run")
    assert found["n_labelled"] == 0 and found["n_images"] == 12
    assert found["agreement"] > 0.5
    assert "top1" not in found and "top1_float" not in found


@pytest.mark.parametrize("command", ["fit", "test"])
def test_photos_without_labels_are_refused_where_accuracy_is_asked_for(
    command: str,
    tmp_path: Path,
    photos: Path,
    checkpoint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--config", "qat/photos", "--model", checkpoint, "--images", photos)
    assert runs.run(command, *words, "--run_dir", tmp_path / "run") == 1
    assert "has no labels" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_photos_without_labels_are_answered_in_order_while_the_model_adapts(
    tmp_path: Path, photos: Path, checkpoint: str
) -> None:
    """A broken photo is refused by name; the adapted model is a checkpoint like any other."""
    (photos / "dark" / "3.png").write_bytes(b"no picture")
    words = ("--config", "tta/tent", "--model", checkpoint, "--images", photos)
    run = ("--run_dir", tmp_path / "run", "--stream.batch_size", 4, "--data.num_calibration", 4)
    assert runs.run("adapt", *words, *run) == 0
    with open(tmp_path / "run" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    files = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    assert [row["image"] for row in rows] == files
    refused = [row for row in rows if row["refused"]]
    assert [row["image"] for row in refused] == ["dark/3.png"]
    assert all(0 < float(row["confidence"]) <= 1 for row in rows if not row["refused"])
    found = runs.metrics(tmp_path / "run")
    assert (found["n_images"], found["n_refused"], found["n_labelled"]) == (16, 1, 0)
    assert found["n_adapted"] > 0 and "error_mean" not in found
    before, after = (qat.load(p) for p in (checkpoint, tmp_path / "run" / "adapted.ckpt"))
    changed = {
        name
        for name, value in after.state_dict().items()
        if isinstance(value, Tensor) and not torch.equal(value, before.state_dict()[name])
    }
    assert changed and all("norm" in name for name in changed)

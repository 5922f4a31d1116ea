"""A newcomer's folder of photos, some of them broken, through every command."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import qat
from qat.card import card_of
from tests import runs

pytestmark = pytest.mark.filterwarnings("ignore:.*(cannot be read|are left out):UserWarning")
QUIET = ("--num_threads", 1, "--trainer.enable_progress_bar", "false")
NAMES = ("cat", "dog", "owl")


def photos(root: Path, names: tuple[str, ...] = NAMES, count: int = 8) -> Path:
    """Small pictures of each class, as bright as its number, litter beside them."""
    generator = np.random.default_rng(0)
    for level, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(60 * level, 60 * level + 90, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
        (root / name / ".DS_Store").write_bytes(b"litter")
    (root / names[0] / "notes.txt").write_text("my cat")
    return root


def source(root: Path) -> dict[str, Any]:
    return {"class_path": "qat.data.sources.image_folder", "init_args": {"root": str(root)}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, one to train on and one to judge by broken, and a model trained on them."""
    home = tmp_path_factory.mktemp("photos")
    photos(home / "train")
    photos(home / "val", count=4)
    (home / "train" / "cat" / "3.png").write_bytes(b"")
    (home / "val" / "dog" / "1.png").write_bytes((home / "val" / "dog" / "2.png").read_bytes()[:60])
    data = {"train": source(home / "train"), "val": source(home / "val"), "batch_size": 8}
    model = {"model": {"init_args": {"num_classes": 3}}}
    runs.write_recipe(home / "recipe.yaml", data=data, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs.fit(home / "recipe.yaml", home / "fit", "--trainer.max_epochs", 2)
    return home


def quantized(home: Path, command: str, folder: Path, *words: object) -> dict[str, Any]:
    """What a command makes of the trained model."""
    teacher = home / "fit" / "checkpoints" / "last.ckpt"
    words = ("--model.model", "null", "--model.teacher", teacher, *words, *QUIET)
    config = home / "recipe.yaml"
    assert runs.run(command, "--config", config, "--run_dir", folder, *words) == 0
    return runs.metrics(folder)


def test_fit_leaves_out_what_is_broken_and_counts_it(home: Path) -> None:
    items = runs.metrics(home / "fit")
    assert (items["n_images"], items["n_refused"], items["n_refused_train"]) == (12, 1, 1)
    assert items["class_names"] == list(NAMES)
    assert items["top1"] == pytest.approx(11 / 12)  # the broken one is the only error
    assert card_of(qat.load(home / "fit" / "checkpoints" / "last.ckpt")).class_names == NAMES


def test_test_counts_the_same_images(home: Path, tmp_path: Path) -> None:
    words = ("--config", home / "recipe.yaml", "--run_dir", tmp_path / "run")
    assert runs.run("test", *words, "--ckpt_path", home / "fit" / "checkpoints" / "last.ckpt") == 0
    items, fitted = runs.metrics(tmp_path / "run"), runs.metrics(home / "fit")
    for key in ("top1", "n_images", "n_refused", "class_names"):
        assert items[key] == fitted[key]


def test_quantize_calibrates_on_what_can_be_read(home: Path, tmp_path: Path) -> None:
    words = ("--model.plan", "w8a8", "--data.num_calibration", 23)  # all but the broken one
    items = quantized(home, "quantize", tmp_path / "run", *words)
    assert (items["n_calibration"], items["n_images"], items["n_refused"]) == (23, 12, 1)
    assert items["top1_float"] == runs.metrics(home / "fit")["top1"]
    assert items["class_names"] == list(NAMES)


@pytest.mark.slow
def test_search_calibrates_on_what_can_be_read(home: Path, tmp_path: Path) -> None:
    words = ("--model.plan", "w8a8", "--search.like", "w4a4", "--data.num_calibration", 23)
    assert quantized(home, "search", tmp_path / "run", *words)["n_calibration"] == 23


@pytest.mark.parametrize("num_workers", [0, 2])
def test_adapt_counts_the_broken_image_in_every_domain(
    home: Path, tmp_path: Path, num_workers: int
) -> None:
    protocol = "--stream.protocol.init_args.corruptions=[contrast,fog]"
    words = ("--stream.style", "cifar", "--stream.batch_size", 5, protocol)
    items = quantized(home, "adapt", tmp_path / "run", *words, "--stream.num_workers", num_workers)
    assert (items["n_images"], items["n_refused"]) == (24, 2)
    assert [row["n_refused"] for row in items["table"]] == [1, 1]
    assert items["error_mean"] >= 1 / 12
    assert "dog/1.png' cannot be read" in (tmp_path / "run" / "stream.csv").read_text()


def error(capsys: pytest.CaptureFixture[str]) -> str:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")][-1]


@pytest.mark.parametrize("command", ["fit", "test"])
def test_validation_folders_of_other_names_are_one_line(
    home: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "val", ("cat", "hound", "owl"), 2)
    checkpoint = home / "fit" / "checkpoints" / "last.ckpt"
    words = ("--ckpt_path", checkpoint) if command == "test" else ()
    root = ("--data.val.init_args.root", tmp_path / "val", "--run_dir", tmp_path / "run")
    assert runs.run(command, "--config", home / "recipe.yaml", *root, *words) == 1
    line = error(capsys)
    assert "data.val has other classes" in line
    assert "'hound'" in line and "'dog'" in line


def test_number_of_classes_that_disagrees_names_those_of_the_data(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model.model.init_args.num_classes", 5, "--run_dir", tmp_path / "run")
    assert runs.run("fit", "--config", home / "recipe.yaml", *words) == 1
    assert "the model has 5 classes, the data has 3 ('cat', 'dog', 'owl')" in error(capsys)


def test_misspelt_source_is_answered_with_those_there_are(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data.val", "image_folder", "--run_dir", tmp_path / "run")
    assert runs.run("fit", "--config", home / "recipe.yaml", *words) == 2
    assert "qat.data.sources.image_folder" in error(capsys)


def test_folder_of_photos_is_read_in_either_layout(home: Path, tmp_path: Path) -> None:
    from qat.cli.main import open_session

    for root, sizes in ((home, (24, 12)), (photos(tmp_path / "mine", count=10), (24, 6))):
        data = open_session("fit", "--config", "qat/photos", "--data", str(root)).data()
        assert (len(data.train), len(data.val)) == sizes


def test_stream_of_other_classes_than_the_models_is_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for names, message in ((("cat", "hound"), "the stream has other classes"), (NAMES, "")):
        root = tmp_path / str(len(names))
        photos(root / "contrast" / "5", names, 2)
        words = ("--stream.images", "qat.data.official.ImageNetC", "--stream.images.root", root)
        words += ("--stream.images.num_classes", len(names), "--run_dir", root / "run")
        words += ("--stream.protocol.init_args.corruptions=[contrast]", *QUIET)
        words += ("--ckpt_path", home / "fit" / "checkpoints" / "last.ckpt")
        status = runs.run("adapt", "--config", home / "recipe.yaml", *words)
        assert status == (1 if message else 0)
        assert message in capsys.readouterr().err

"""Which model a command starts from, and whether it was ever trained, is never left in doubt."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from qat.card import untrained
from qat.quantizers import Affine, quantizers
from tests import runs
from tests.conftest import make_tiny_vit
from tests.qat.common import plan

FLOAT = "configs/digits_teacher.yaml"
W8A8 = ("--model.plan", "w8a8", "--model.quantizer", "qat.quantizers.Affine")
STREAM = ("--stream.style", "cifar", "--stream.num_images", 10, "--stream.batch_size", 10)
SEARCH = ("--search.weights", "[4,8]", "--search.activations", "[4,8]", "--data.num_calibration", 4)
MORE = {"quantize": (), "search": SEARCH, "adapt": STREAM}


def _run(command: str, folder: Path, *words: object) -> dict[str, Any]:
    start = ("--config", FLOAT, "--run_dir", folder, *MORE.get(command, ()))
    assert runs.run(command, *start, *words) == 0
    return runs.metrics(folder)


def test_float_checkpoint_is_what_is_quantized(teacher: Path, tmp_path: Path) -> None:
    found = _run("quantize", tmp_path / "run", "--ckpt_path", teacher, *W8A8)
    assert found["top1_float"] == runs.metrics(teacher.parents[1])["top1"] > 0.5
    assert "untrained" not in found
    model = qat.load(tmp_path / "run" / "model.ckpt")
    assert torch.equal(model.head.bias, qat.load(teacher).head.bias)  # type: ignore[union-attr]
    assert any(True for _ in quantizers(model))


@pytest.mark.parametrize("command", ["search", "adapt"])
def test_float_checkpoint_is_what_is_searched_and_adapted(
    command: str, teacher: Path, tmp_path: Path
) -> None:
    found = _run(command, tmp_path / "run", "--ckpt_path", teacher, *W8A8)
    assert "untrained" not in found and found["coverage_macs"] == 1.0


@pytest.mark.parametrize("command", ["quantize", "search", "adapt"])
def test_recipe_with_a_model_and_a_teacher_names_two_models_and_is_refused(
    command: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--config", FLOAT, "--run_dir", tmp_path / "run", "--model.teacher", teacher, *W8A8)
    assert runs.run(command, *words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"name two models; start from .* --ckpt_path {teacher}", line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["quantize", "search", "adapt"])
def test_checkpoint_that_contradicts_the_recipe_is_refused(
    command: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny_vit()
    qat.save(model, tmp_path / "other.ckpt")
    qat.convert_(model, plan(4), Affine)
    qat.calibrate(model, [torch.randn(4, 1, 8, 8)])
    qat.save(model, tmp_path / "w4a4.ckpt")
    for name, message in (
        ("other.ckpt", "the recipe builds .* but checkpoint"),
        ("w4a4.ckpt", "is quantized already|holds one with another plan"),
    ):
        words = ("--config", FLOAT, "--run_dir", tmp_path / "run", *W8A8)
        assert runs.run(command, *words, "--ckpt_path", tmp_path / name) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["test", "quantize", "search", "adapt"])
def test_random_weights_are_said_aloud_and_stand_in_the_metrics(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _run(command, tmp_path / "run", *(() if command == "test" else W8A8))
    assert found["untrained"] == "every layer, with its classifier 'head'"
    assert "untrained: every layer, with its classifier 'head'" in capsys.readouterr().out


def test_random_weights_are_known_after_saving_and_quantizing_them(tmp_path: Path) -> None:
    _run("quantize", tmp_path / "first", *W8A8)
    words = ("--ckpt_path", tmp_path / "first" / "model.ckpt", "--run_dir", tmp_path / "second")
    assert runs.run("test", "--config", FLOAT, *words) == 0
    assert "untrained" in runs.metrics(tmp_path / "second")


def test_classifier_of_another_size_than_that_of_the_weights_is_named(tmp_path: Path) -> None:
    model = make_tiny_vit()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    arguments = {**dict(model.card.recipe), "weights": str(tmp_path / "weights.pth")}  # type: ignore[union-attr, arg-type]
    assert untrained(model).startswith("every layer")
    assert untrained(qat.timm_model(**arguments)) == ""
    other = qat.timm_model(**{**arguments, "num_classes": 7})
    assert untrained(other) == "its classifier 'head'"
    qat.save(other, tmp_path / "other.ckpt")
    assert untrained(qat.load(tmp_path / "other.ckpt")) == "its classifier 'head'"


@pytest.mark.parametrize("way", ["step", "load"])
def test_model_that_was_trained_or_filled_by_hand_is_not_called_random(
    way: str, tmp_path: Path
) -> None:
    model = make_tiny_vit()
    if way == "load":
        torch.manual_seed(5)
        model.load_state_dict(make_tiny_vit().state_dict())
    else:
        model(torch.randn(2, 1, 8, 8)).square().sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    assert untrained(model) == ""
    qat.save(model, tmp_path / "model.ckpt")
    assert untrained(qat.load(tmp_path / "model.ckpt")) == ""


def test_fit_says_nothing_of_random_weights(teacher: Path) -> None:
    assert "untrained" not in runs.metrics(teacher.parents[1])
    assert untrained(qat.load(teacher)) == ""


def test_plan_shows_what_quantizing_a_float_checkpoint_would_give(
    teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.run("plan", "--config", FLOAT, "--ckpt_path", teacher, *W8A8) == 0
    assert "w8a8" in capsys.readouterr().out

"""`train.py quantize`: result, checkpoint, grid, resuming, refusals."""

import csv
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import qat
from ptq_init import mgrq
from qat.quantizers import Phase, quantizers
from tests import runs

PLAN = "w4a4"
LOG = {
    "class_path": "qat.quantizers.PerOperand",
    "init_args": {"attention": "qat.quantizers.LogSqrt2"},
}
QUIET = ("--trainer.enable_progress_bar", "false", "--num_threads", 1)


def _recipe(path: Path, teacher: Path, initialise: dict[str, Any], **data: Any) -> Path:
    recipe = {
        "base": str(runs.ROOT / "configs/digits_teacher.yaml"),
        "model": {
            "model": None,
            "teacher": str(teacher),
            "plan": PLAN,
            "quantizer": LOG,
            "initialise": initialise,
        },
        "data": data,
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def repq(tmp_path: Path, teacher: Path) -> Path:
    """A recipe that takes a second."""
    path = tmp_path / "repq.yaml"
    return _recipe(path, teacher, {"class_path": "ptq_init.repq_vit.RepQViT"})


@pytest.fixture
def trained(tmp_path: Path, teacher: Path) -> Path:
    """A recipe that reconstructs blocks."""
    arguments = {"num_steps": 2, "batch_size": 4}
    initialise = {"class_path": "ptq_init.mgrq.MGRQ", "init_args": arguments}
    return _recipe(tmp_path / "mgrq.yaml", teacher, initialise, num_augmented=16)


def _quantize(config: Path, folder: Path, *words: object) -> dict[str, Any]:
    assert runs.run("quantize", "--config", config, "--run_dir", folder, *QUIET, *words) == 0
    return runs.metrics(folder)


def test_metrics_hold_the_contract_and_the_checkpoint_gives_the_same_accuracy(
    repq: Path, tmp_path: Path
) -> None:
    found = _quantize(repq, tmp_path / "run")
    keys = {"top1", "top1_float", "agreement", "logit_error", "seconds_calibration", "command"}
    keys |= {"recipe", "seed", "seconds", "device", "coverage_macs", "size_bytes", "bops"}
    assert keys <= set(found)
    assert found["n_images"] == 360 and found["n_calibration"] == 32
    assert found["coverage_macs"] == 1.0
    model = qat.load(tmp_path / "run" / "model.ckpt")
    assert all(q.phase is Phase.QUANTIZE for _, q in quantizers(model))
    words = ("--config", repq, "--ckpt_path", tmp_path / "run" / "model.ckpt")
    assert runs.run("test", *words, "--run_dir", tmp_path / "test") == 0
    assert runs.metrics(tmp_path / "test")["top1"] == found["top1"]


def test_images_drawn_from_the_evaluation_set_are_not_evaluated(repq: Path, tmp_path: Path) -> None:
    words = ("--data.calibrate_on", "val", "--data.num_calibration", 20)
    assert _quantize(repq, tmp_path / "run", *words)["n_images"] == 340


def test_reconstruction_writes_its_losses_and_cleans_up(trained: Path, tmp_path: Path) -> None:
    found = _quantize(trained, tmp_path / "run")
    with open(tmp_path / "run" / "reconstruction.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"block", "global", "local", "loss"} <= set(rows[0])
    assert [row["step"] for row in rows] == ["0", "1"] * (len(rows) // 2)
    assert rows[0]["part"] == "patch_embed" and rows[-1]["part"] == "head"
    assert found["activation_bytes"] > 0 and found["n_calibration"] == 48
    assert not (tmp_path / "run" / "stages").exists()


def _flip(path: Path) -> None:
    """Turn a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda _: None, id="whole"),
        pytest.param(_flip, id="flipped bit", marks=pytest.mark.slow),
    ],
)
def test_interrupted_run_continues_to_the_same_model(
    damage: Callable[[Path], None], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _quantize(trained, tmp_path / "whole")
    exact = mgrq.TokenSupervision.__call__
    calls = []

    def stop(self: mgrq.TokenSupervision, step: Any) -> torch.Tensor:
        calls.append(step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return exact(self, step)

    monkeypatch.setattr(mgrq.TokenSupervision, "__call__", stop)
    words = ("--config", trained, "--run_dir", tmp_path / "run", *QUIET)
    assert runs.run("quantize", *words) == 130
    stages = tmp_path / "run" / "stages"
    assert [path.name for path in stages.iterdir()] == ["patch_embed.ckpt"]
    damage(stages / "patch_embed.ckpt")
    monkeypatch.setattr(mgrq.TokenSupervision, "__call__", exact)
    found = _quantize(trained, tmp_path / "run", "--ckpt_path", "last")
    assert found["resumed"] and not whole["resumed"]
    first, second = (
        qat.load(tmp_path / name / "model.ckpt").state_dict() for name in ("whole", "run")
    )
    assert all(torch.equal(v, second[k]) for k, v in first.items() if isinstance(v, torch.Tensor))
    tables = [(tmp_path / name / "reconstruction.csv").read_text() for name in ("whole", "run")]
    assert tables[0] == tables[1]


def test_grid_runs_every_choice_and_skips_those_that_are_done(
    repq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, bits in (("low", 3), ("high", 8)):
        plan = f"w{bits}a{bits}"
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"model": {"plan": plan}}))
    grid = {"bits": [str(tmp_path / "low.yaml"), str(tmp_path / "high.yaml")]}
    words = ("--grid", yaml.safe_dump(grid, default_flow_style=True), "--draws", 2)
    found = _quantize(repq, tmp_path / "run", *words)
    assert [(row["bits"], row["seed"]) for row in found["table"]] == [
        ("low", 0), ("low", 1), ("high", 0), ("high", 1)
    ]  # fmt: skip
    assert found["table"][0]["bops"] < found["table"][2]["bops"]
    assert "Comparison; top1_float" in capsys.readouterr().out
    (tmp_path / "run" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "run" / "high-1")
    again = _quantize(repq, tmp_path / "run", *words, "--ckpt_path", "last")
    assert [row["top1"] for row in again["table"]] == [row["top1"] for row in found["table"]]
    assert again["table"][:3] == found["table"][:3]


@pytest.mark.parametrize(
    ("grid", "draws", "message"),
    [
        ("method: [one/low.yaml, other/low.yaml]", 1, "two choices of a grid have one name"),
        ("bits: {low: {model: {plan: w3a3}}}", 0, "draws must be at least 1, got 0"),
    ],
)
def test_grid_without_sense_is_refused(
    grid: str, draws: int, message: str, repq: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ("--config", repq, "--run_dir", tmp_path / "run", *QUIET)
    assert runs.run("quantize", *words, "--grid", f"{{{grid}}}", "--draws", draws) != 0
    assert message in capsys.readouterr().err


def test_grid_reads_every_choice_before_it_runs_one(
    repq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "low.yaml").write_text("model: {plan: w3a3}")
    grid = {"bits": [str(tmp_path / "low.yaml"), str(tmp_path / "nowhere.yaml")]}
    words = ("--config", repq, "--run_dir", tmp_path / "run", *QUIET)
    grid_words = ("--grid", yaml.safe_dump(grid, default_flow_style=True))
    assert runs.run("quantize", *words, *grid_words) != 0
    assert "nowhere.yaml" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*/metrics.json"))


def test_init_names_the_initialiser_of_a_fit(teacher: Path, tmp_path: Path) -> None:
    words = ("--model.teacher", teacher, *runs.SHORT)
    losses = []
    for name in ("ptq_init.minmax.MinMaxRange", "ptq_init.repq_vit.RepQViT"):
        folder = tmp_path / name
        runs.fit("configs/qat/digits_w4a4_lsq.yaml", folder, *words, "--init", name)
        losses.append(runs.weights(folder))
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model.plan", "null"), "nothing to quantize: set model.plan"),
        (("--ckpt_path", "x.ckpt"), "--ckpt_path x.ckpt and model.teacher .* name two models"),
        (("--ckpt_path", "last"), "no run to continue"),
        (("--data.calibrate_on", "val", "--data.num_calibration", 360), "leaves none of the 360"),
        (("--data.num_augmented", 4, "--data.augment", "null"), "num_augmented needs data.augment"),
        (("--init", "ptq_init.repq_vit.RepQVit"), "RepQVit"),
        (("--require_coverage", 1.01), "below the required 1.01"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value[:2])),
)
def test_what_cannot_be_done_is_refused_in_one_line(
    words: tuple[object, ...],
    message: str,
    repq: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert runs.run("quantize", "--config", repq, "--run_dir", tmp_path / "run", *words) != 0
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and re.search(message, line)
    assert not (tmp_path / "run").exists(), "the corrected command would be refused"


def test_run_of_another_recipe_is_not_continued(
    repq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("quantize", "--config", repq, "--run_dir", tmp_path / "run", *QUIET)
    _quantize(repq, tmp_path / "run")
    assert runs.run(*words) == 1
    assert "already holds a run" in capsys.readouterr().err
    (tmp_path / "run" / "metrics.json").unlink()
    assert runs.run(*words, "--ckpt_path", "last", "--seed_everything", 5) == 1
    assert "had another recipe" in capsys.readouterr().err

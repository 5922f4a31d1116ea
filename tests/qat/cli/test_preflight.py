"""What cannot finish is refused before the first step, and leaves no folder behind."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from qat.cli.main import open_session
from qat.cli.preflight import Schedule, require_monitors
from qat.lightning.callbacks import OscillationTracker
from tests import runs

FLOAT = "configs/digits_teacher.yaml"
STOP = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--trainer.limit_val_batches", 0), "limit_val_batches 0 leaves no image to evaluate"),
        (("--trainer.limit_val_batches", 0.01), "limit_val_batches 0.01 of 6 batches leaves none"),
        (("--trainer.limit_train_batches", 0), "limit_train_batches 0 trains nothing"),
        (("--trainer.limit_train_batches", 0.01), "0.01 of 22 batches leaves none"),
        (("--trainer.max_epochs", 0), "max_epochs 0 trains nothing"),
        (("--trainer.max_epochs", -1), "max_epochs -1 never ends"),
        (("--trainer.max_epochs", -3), "must be a non-negative integer or -1"),
        (("--trainer.max_steps", 0), "max_steps 0 trains nothing"),
        (("--trainer.precision", "bf16-true"), "precision bf16-true .* use 32-true"),
        (("--trainer.precision", "64-true"), "precision 64-true .* use 32-true"),
        (("--trainer.precision", "16-true"), "precision 16-true .* use 32-true"),
        (("--trainer.precision", 64), "precision 64 .* use 32-true"),
        (("--trainer.accelerator", "gpu"), "gpu"),
        (("--trainer.devices", 0), "devices"),
        (("--trainer.strategy", "ddp_spawn"), "strategy ddp_spawn; use auto or ddp"),
        (("--trainer.strategy", "fsdp"), "strategy fsdp; use auto or ddp"),
        (("--trainer.enable_checkpointing", "false"), "would lose what fit trains"),
        (("--data.num_calibration", 0), "a num_calibration and a batch_size of at least 1"),
        (("--data.batch_size", 0), "a num_calibration and a batch_size of at least 1"),
        (("--data.batch_size", 2000), "batch_size 2000 exceeds"),
        ((*STOP, "val/top1x"), "monitors 'val/top1x', which is never logged; did you mean"),
        ((*STOP, "val_loss"), "never logged; did you mean 'val/loss'"),
        ((*STOP, "val/loss", "--trainer.max_steps", 4), "the first validation comes after 22"),
        ((*STOP, "val/loss", "--trainer.check_val_every_n_epoch", 50), "comes after 1100"),
        ((*STOP, "train/soft"), "train/soft', which is never logged"),
        (
            ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/top5x"),
            "ModelCheckpoint monitors 'val/top5x', which is never logged",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(map(str, value[-2:])),
)
def test_run_that_could_not_finish_is_refused_before_it_leaves_anything(
    words: tuple[object, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "gpu" in words:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert runs.run("fit", "--config", FLOAT, "--run_dir", tmp_path / "run", *words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (22, 880, 22)),
        ({"max_epochs": 2, "limit_train_batches": 5}, (5, 10, 5)),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, (11, 22, 11)),
        ({"max_epochs": 2, "val_check_interval": 0.25}, (22, 44, 5)),
        ({"max_epochs": 2, "val_check_interval": 7}, (22, 44, 7)),
        ({"max_epochs": 3, "check_val_every_n_epoch": 2}, (22, 66, 44)),
        ({"max_steps": 30, "max_epochs": -1}, (22, 30, 22)),
        ({"max_steps": 7, "accumulate_grad_batches": 4}, (22, 26, 22)),
        (
            {"max_steps": 9, "val_check_interval": 8, "check_val_every_n_epoch": None},
            (22, 9, 8),
        ),
        ({"max_steps": 9, "val_check_interval": "00:00:10:00"}, (22, 9, 0)),
    ],
    ids=str,
)
def test_schedule_counts_batches_and_finds_the_first_validation(
    settings: dict[str, Any], expected: tuple[float, ...], tmp_path: Path
) -> None:
    recipe = runs.write_recipe(tmp_path / "recipe.yaml", trainer=settings)
    session = open_session("fit", "--config", str(recipe), "--run_dir", str(tmp_path / "run"))
    data = session.data()
    card = session.model().card
    data.attach(card.preprocessing, 10)
    found = Schedule.of(session.evaluator(), data)
    assert (found.batches, found.total, found.first_validation) == expected


@pytest.mark.parametrize("steps", [4, 5, 6])
def test_best_checkpoint_is_there_if_and_only_if_a_validation_was_foreseen(
    steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--trainer.max_steps", steps, "--trainer.limit_train_batches", 5)
    runs.fit(FLOAT, tmp_path / "run", *words)
    best = (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()
    assert best == (steps >= 5)
    assert ("no best.ckpt, only last.ckpt" in capsys.readouterr().out) != best


def test_all_that_is_logged_is_known_to_the_check(lsq_run: Path, binary_run: Path) -> None:
    for folder in (lsq_run, binary_run):
        with open(folder / "metrics.csv", newline="") as file:
            header = set(next(csv.reader(file))) - {"epoch", "step"}
        recipe = yaml.safe_load((folder / "config.yaml").read_text())
        session = open_session("fit", "--config", str(folder / "config.yaml"))
        known = {*session.module().measures, *OscillationTracker.measures}
        assert recipe["model"]["teacher"] and header <= known
        assert {name for name in known if name.startswith("val/")} <= header


def test_monitor_of_what_an_unknown_callback_may_log_is_let_through() -> None:
    schedule = Schedule(5, 10, 5)
    own = SimpleNamespace(monitor=None)
    waiting = SimpleNamespace(monitor="val/mine")
    require_monitors([own, waiting], ["val/top1"], schedule)
    with pytest.raises(ValueError, match="the first validation comes after 50"):
        require_monitors([own, waiting], ["val/top1"], Schedule(5, 10, 50))


@pytest.mark.parametrize("command", ["test", "quantize", "search", "adapt"])
def test_other_commands_refuse_what_they_could_not_evaluate(
    command: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (("--trainer.precision", "bf16-true"), ("--trainer.limit_val_batches", 0)):
        plan = () if command == "test" else ("--model.plan", "w8a8")
        start = ("--config", FLOAT, "--ckpt_path", teacher, "--run_dir", tmp_path / "run")
        assert runs.run(command, *start, *plan, *words) == 1
        assert re.search("use 32-true|leaves no image", capsys.readouterr().err)
        assert not (tmp_path / "run").exists()


def test_flags_of_the_trainer_hold_for_the_teacher_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--config", "configs/default.yaml", "--run_dir", tmp_path / "run")
    assert runs.run("fit", *words, "--trainer.fast_dev_run", 2) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--trainer.fast_dev_run=2" in shown and "hold for the teacher too" in shown
    found = [runs.metrics(tmp_path / name) for name in ("run", "run/teacher")]
    assert [(items["epochs"], items["n_images"]) for items in found] == [(1, 128), (1, 128)]
    assert found[0]["n_images_teacher"] == 128

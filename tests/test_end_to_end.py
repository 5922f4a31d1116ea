"""Whole runs on real images: train, kill, interrupt, resume, track."""

import contextlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from qat.cli.main import main
from tests.runs import QUIET, ROOT, SHORT, TINY, fit, metrics, run, weights, write_recipe


def lasting(items: dict[str, Any]) -> dict[str, Any]:
    """Metrics without what differs from one run to the next."""
    return {key: value for key, value in items.items() if key != "seconds"}


def start(*words: object) -> subprocess.Popen[bytes]:
    """`train.py fit` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "train.py", "fit", *map(str, words), *QUIET],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def end(process: subprocess.Popen[bytes], signal_number: int, folder: Path, wait: float) -> int:
    """Exit status after a signal, sent `wait` seconds after the first checkpoint."""
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    time.sleep(wait)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    assert not (folder / "metrics.json").exists(), "the run had finished before the signal"
    assert b"Traceback" not in errors, errors.decode()
    return process.returncode


def _resumable(tmp_path: Path, num_workers: int, **changes: Any) -> Path:
    """A W4A4 recipe whose weights depend on every random number and every batch."""
    return write_recipe(
        tmp_path / "recipe.yaml",
        **{
            "model": {
                "model": {"init_args": {"model_args": {**TINY, "drop_path_rate": 0.1}}},
                "plan": "configs/plans/vit_w4a4.yaml",
            },
            "data": {"num_workers": num_workers},
            "trainer": {"max_epochs": 10, "limit_train_batches": 6},
            **changes,
        },
    )


def _assert_same_run(found: Path, expected: Path) -> None:
    assert lasting(metrics(found)) == lasting(metrics(expected))
    assert weights(found) == weights(expected)
    # An interrupt between the end of an epoch and its logging loses a row, but never adds one.
    rows, whole = ((f / "metrics.csv").read_text().splitlines() for f in (found, expected))
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(whole)
    assert len(rows) >= len(whole) - 1


@pytest.mark.parametrize(
    ("signal_number", "status", "num_workers"),
    [
        pytest.param(signal.SIGKILL, -9, 0, id="kill"),
        pytest.param(signal.SIGKILL, -9, 2, id="kill-workers", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, 0, id="interrupt", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, 2, id="interrupt-workers", marks=pytest.mark.slow),
    ],
)
def test_run_that_was_ended_at_a_random_moment_resumes_to_the_same_metrics_and_weights(
    signal_number: int, status: int, num_workers: int, tmp_path: Path
) -> None:
    recipe = _resumable(tmp_path, num_workers)
    fit(recipe, tmp_path / "whole")
    process = start("--config", recipe, "--run_dir", tmp_path / "parts")
    wait = random.SystemRandom().uniform(0, 0.5)
    assert end(process, signal_number, tmp_path / "parts", wait) == status, f"after {wait} s"
    fit(recipe, tmp_path / "parts", "--ckpt_path", "last")
    _assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_run_that_needs_its_random_numbers_differs_with_another_seed(tmp_path: Path) -> None:
    recipe = _resumable(tmp_path, 0, trainer={"max_epochs": 1, "limit_train_batches": 2})
    for seed in (0, 1):
        fit(recipe, tmp_path / str(seed), "--seed_everything", seed)
    assert weights(tmp_path / "0") != weights(tmp_path / "1")


def test_finished_run_that_is_resumed_stays_as_it_is(tmp_path: Path) -> None:
    recipe = _resumable(tmp_path, 0, trainer={"max_epochs": 2, "limit_train_batches": 2})
    expected, state = fit(recipe, tmp_path / "run"), weights(tmp_path / "run")
    found = fit(recipe, tmp_path / "run", "--ckpt_path", "last")
    assert lasting(found) == lasting(expected)
    assert weights(tmp_path / "run") == state


def test_resumed_run_continues_with_longer_training(tmp_path: Path) -> None:
    recipe = _resumable(tmp_path, 0, trainer={"max_epochs": 1, "limit_train_batches": 2})
    fit(recipe, tmp_path / "run")
    more = ("--ckpt_path", "last", "--trainer.max_epochs", 3)
    assert fit(recipe, tmp_path / "run", *more)["epochs"] == 3
    assert "max_epochs: 3" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("--model.optimizer.init_args.lr", 0.5),
            "model.optimizer.init_args.lr is 0.002 there and 0.5 here",
        ),
        (("--seed_everything", 5), "seed_everything is 0 there and 5 here"),
        (("--data.batch_size", 16), "data.batch_size is 64 there and 16 here"),
    ],
    ids=["lr", "seed", "batch size"],
)
def test_run_of_another_recipe_is_not_continued(
    words: tuple[object, ...],
    told: str,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(teacher.parents[1], tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    config = ("--config", "configs/digits_teacher.yaml", "--run_dir", tmp_path / "run")
    length = ("--trainer.max_epochs", 1)
    assert run("fit", *config, *length, *words, "--ckpt_path", "last") == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "had another recipe" in line and told in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.filterwarnings("ignore:SWA is currently only", "ignore:Swapping scheduler")
def test_last_checkpoint_is_the_averaged_model_that_was_measured(tmp_path: Path) -> None:
    settings = {"swa_lrs": 0.01, "swa_epoch_start": 1}
    averaging = "pytorch_lightning.callbacks.StochasticWeightAveraging"
    callbacks = [{"class_path": averaging, "init_args": settings}]
    trainer = {"max_epochs": 2, "limit_train_batches": 2, "callbacks": callbacks}
    recipe = _resumable(tmp_path, 0, trainer=trainer)
    found = fit(recipe, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    words = ("--config", recipe, "--run_dir", tmp_path / "test", "--ckpt_path", last)
    assert run("test", *words) == 0
    assert metrics(tmp_path / "test")["loss"] == found["loss"]


def test_teacher_recipe_is_trained_first_and_once(tmp_path: Path) -> None:
    write_recipe(tmp_path / "teacher.yaml", trainer={"max_epochs": 1, "limit_train_batches": 2})
    recipe = write_recipe(
        tmp_path / "student.yaml",
        "configs/qat/digits_w4a4_lsq.yaml",
        teacher_config=str(tmp_path / "teacher.yaml"),
        trainer={"max_epochs": 1, "limit_train_batches": 2},
    )
    found = fit(recipe, tmp_path / "run")
    taught = metrics(tmp_path / "run" / "teacher")
    assert found["top1_teacher"] == taught["top1"]
    written = (tmp_path / "run" / "teacher" / "metrics.json").stat().st_mtime_ns
    fit(recipe, tmp_path / "run", "--ckpt_path", "last")
    assert (tmp_path / "run" / "teacher" / "metrics.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("config", ["configs/default.yaml", "configs/digits_teacher.yaml"])
@pytest.mark.slow
def test_without_a_command_it_is_fit_and_without_a_recipe_the_default_one(
    config: str, teacher: Path, tmp_path: Path
) -> None:
    default = config == "configs/default.yaml"
    named = ["--model.teacher", teacher] if default else ["--config", config]
    words = [*named, "--run_dir", tmp_path / "run", *SHORT, *QUIET]
    with contextlib.chdir(ROOT):
        assert main([str(word) for word in words]) == 0
    found = metrics(tmp_path / "run")
    assert (found["command"], found["recipe"]) == ("fit", Path(config).stem)
    assert (found["coverage_macs"] > 0.9) == default


def _wandb_records(path: Path) -> list[Record]:
    """Records of a `.wandb` file: the log format of LevelDB behind a header of seven bytes."""
    content, at, parts, records = path.read_bytes(), 7, b"", []
    assert content.startswith(b":W&B")
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


@pytest.mark.usefixtures("_no_network")
def test_wandb_offline_keeps_config_loss_and_flip_rate_inside_the_run_folder(
    teacher: Path, tmp_path: Path
) -> None:
    found = fit(
        "configs/qat/digits_w4a4_lsq.yaml",
        tmp_path / "run",
        *("--model.teacher", teacher, *SHORT, "--trainer.log_every_n_steps", 1),
        *("--trainer.logger", "WandbLogger"),
    )
    assert wandb.run is None, "the run is not finished, so its file is not complete"
    (log,) = tmp_path.rglob("*.wandb")
    assert log.is_relative_to(tmp_path / "run")
    records = _wandb_records(log)
    config: dict[str, Any] = {}
    history: dict[str, list[Any]] = {}
    for record in records:
        for item in (*record.run.config.update, *record.config.update):
            config[_key(item)] = json.loads(item.value_json)
        for item in record.history.item:
            history.setdefault(_key(item), []).append(json.loads(item.value_json))
    assert "qat.quantizers.LSQ" in json.dumps(config)
    assert "configs/plans/vit_w4a4.yaml" in json.dumps(config)
    assert len(history["train/loss"]) == 4
    assert history["weights/flip_rate"] == [pytest.approx(found["flip_rate"])]
    assert not (ROOT / "wandb").exists()


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    yield
    wandb.finish()


def test_tensorboard_by_class_path_writes_its_events_into_the_run_folder(tmp_path: Path) -> None:
    logger = {"class_path": "pytorch_lightning.loggers.TensorBoardLogger"}
    logger["init_args"] = {"save_dir": "."}
    recipe = write_recipe(tmp_path / "recipe.yaml", trainer={"logger": logger})
    fit(recipe, tmp_path / "run", *SHORT)
    events = [*(tmp_path / "run").rglob("events.out.tfevents*")]
    assert events
    assert any(b"val/top1" in path.read_bytes() for path in events)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_default_recipe_trains_a_teacher_over_97_percent_and_a_student_within_5_points(
    seed: int, tmp_path: Path
) -> None:
    found = fit("configs/default.yaml", tmp_path / "run", "--seed_everything", seed)
    assert found["top1_teacher"] > 0.97
    assert found["top1"] > found["top1_teacher"] - 0.05


@pytest.mark.slow
@pytest.mark.skipif("LOWBIT_ASSETS" not in os.environ, reason="LOWBIT_ASSETS is not set")
def test_imagenet_model_of_the_assets_has_its_known_accuracy(tmp_path: Path) -> None:
    config = ROOT / "configs/float/imagenet_vit_tiny.yaml"
    assert run("test", "--config", config, "--run_dir", tmp_path / "run") == 0
    found = metrics(tmp_path / "run")
    assert (round(found["top1"] * 500), found["n_images"]) == (403, 500)
    assert found["top1"] == pytest.approx(0.806, abs=1e-6)

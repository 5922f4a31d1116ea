"""How a run ends: one line whatever was raised, valid JSON, and nothing lost that was done."""

import errno
import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.cli import training
from qat.cli.commands import adapt
from qat.cli.main import main
from qat.cli.run_folder import RunFolder
from qat.cli.session import Session
from qat.cli.trackers import finish
from qat.lightning.data import VisionData
from qat.lightning.modules import Distillation
from qat.lightning.tasks import Classification
from tests import runs

FLOAT = "configs/digits_teacher.yaml"
TWO = ("--trainer.max_epochs", 2, "--trainer.limit_train_batches", 2)
W8A8 = ("--model.plan", "w8a8", "--model.quantizer", "qat.quantizers.Affine")
Line = Callable[..., str]


@pytest.fixture
def line(capsys: pytest.CaptureFixture[str]) -> Line:
    """Runs a command that must fail, and returns its only line of error output."""

    def run(*words: object, status: int = 1) -> str:
        assert runs.run(*map(str, words)) == status
        (found,) = capsys.readouterr().err.splitlines()
        assert found.startswith("error: ")
        return found

    return run


def _strict(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_loss_that_is_not_finite_ends_the_run_after_saving(line: Line, tmp_path: Path) -> None:
    words = ("--config", FLOAT, "--run_dir", tmp_path / "run", *TWO)
    found = line("fit", *words, "--model.optimizer.lr", "1e30")
    assert re.search(r"the loss is nan at step 1; lower the learning rate", found)
    assert not (tmp_path / "run" / "metrics.json").exists(), "the run would count as done"
    model = qat.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_broken_weights_do_not_replace_the_last_whole_checkpoint(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = Distillation.training_step

    def break_at_the_end(self: Distillation, *args: Any) -> Any:
        if self.global_step == 3:
            nn.init.constant_(self.model.head.weight, torch.nan)  # type: ignore[union-attr, arg-type]
        return exact(self, *args)

    monkeypatch.setattr(Distillation, "training_step", break_at_the_end)
    line("fit", "--config", FLOAT, "--run_dir", tmp_path / "run", *TWO)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert qat.checkpoint.read(last)["global_step"] == 2
    assert qat.load(last).head.weight.isfinite().all()  # type: ignore[union-attr, operator]


def test_measure_that_is_not_finite_ends_the_run_after_its_epoch(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = nn.functional.cross_entropy

    def broken(logits: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return exact(logits, *args, **options) * (1.0 if logits.requires_grad else torch.inf)

    monkeypatch.setattr(nn.functional, "cross_entropy", broken)
    found = line("fit", "--config", FLOAT, "--run_dir", tmp_path / "run", *TWO)
    assert "val/loss is inf after epoch 0" in found
    assert qat.checkpoint.read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_result_that_is_not_finite_is_written_as_null_and_named(tmp_path: Path) -> None:
    items = {"top1": 0.5, "loss": float("nan"), "table": [{"a": float("inf"), "b": [1.0]}]}
    with pytest.raises(ValueError, match=r"loss, table\.0\.a is not finite"):
        finish(RunFolder(tmp_path), [], items)
    found = _strict(tmp_path / "metrics.json")
    assert found["loss"] is None and found["table"] == [{"a": None, "b": [1.0]}]
    assert found["top1"] == 0.5 and found["not_finite"] == ["loss", "table.0.a"]


def test_evaluation_that_is_not_finite_fails_with_strict_json(
    line: Line, teacher: Path, tmp_path: Path
) -> None:
    model = qat.load(teacher)
    nn.init.constant_(model.head.weight, torch.nan)  # type: ignore[union-attr, arg-type]
    qat.save(model, tmp_path / "broken.ckpt")
    words = ("--ckpt_path", tmp_path / "broken.ckpt", "--run_dir", tmp_path / "run")
    assert "loss is not finite" in line("test", "--config", FLOAT, *words)
    assert _strict(tmp_path / "run" / "metrics.json")["not_finite"] == ["loss"]


FOREIGN = [
    (AssertionError(), r"AssertionError in .*test_endings\.py, line \d+, `raise .*without a text"),
    (RuntimeError("deep\n inside"), r"RuntimeError in .*: deep inside; set LOWBIT_DEBUG=1"),
    (MemoryError(), r"MemoryError in .*: without a text"),
    (KeyError("name"), r"KeyError in .*: 'name'"),
    (ValueError(), r"ValueError in .*: without a text"),
    (OSError(errno.ENOSPC, "No space left on device", "x/y"), r"No space left .*'x/y'; free some"),
    (OSError(errno.EROFS, "Read-only file system", "x"), r"Read-only .*'x'; choose a --run_dir"),
    (PermissionError(errno.EACCES, "Permission denied", "x"), r"denied: 'x'; change its permis"),
    (OSError("odd"), r"OSError in .*: odd; set LOWBIT_DEBUG=1"),
]


@pytest.mark.parametrize(("error", "message"), FOREIGN, ids=lambda x: repr(x)[:24])
def test_exception_of_any_library_is_one_line_with_its_cause(
    error: Exception, message: str, line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(session: Session) -> None:
        raise error

    monkeypatch.setattr(Session, "prepare", fail)
    found = line("fit", "--config", FLOAT, "--run_dir", tmp_path / "run")
    assert re.search(message, found), found
    assert "Traceback" not in found


def test_debug_variable_shows_the_traceback_before_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(session: Session) -> None:
        raise RuntimeError("deep inside")

    monkeypatch.setattr(Session, "prepare", fail)
    monkeypatch.setenv("LOWBIT_DEBUG", "1")
    assert runs.run("fit", "--config", FLOAT, "--run_dir", tmp_path / "run") == 1
    errors = capsys.readouterr().err
    assert "Traceback (most recent call last)" in errors and "in fail" in errors
    assert errors.splitlines()[-1].startswith("error: RuntimeError")


def test_assertion_without_a_text_inside_a_component_is_shown_as_code(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*args: Any, **options: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("timm.create_model", build)
    found = line("fit", "--config", FLOAT, "--run_dir", tmp_path / "run")
    assert "qat.models.timm_model" in found and "`raise AssertionError`: without a text" in found


@pytest.mark.parametrize("command", ["fit", "test", "quantize"])
@pytest.mark.parametrize("place", ["file", "file/below"])
def test_run_folder_that_cannot_be_is_one_line(
    command: str, place: str, line: Line, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    plan = W8A8 if command == "quantize" else ()
    found = line(command, "--config", FLOAT, *plan, "--run_dir", tmp_path / place)
    assert "cannot be used" in found and "choose another --run_dir" in found
    assert (tmp_path / "file").read_text() == "mine"


def _raise(*args: Any, **options: Any) -> None:
    raise RuntimeError("at the very end")


def test_quantized_model_survives_an_evaluation_that_fails(
    line: Line, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classification, "compare", _raise)
    words = ("--config", FLOAT, "--ckpt_path", teacher, *W8A8, "--run_dir", tmp_path / "run")
    assert "at the very end" in line("quantize", *words)
    qat.load(tmp_path / "run" / "model.ckpt")


def test_training_survives_an_evaluation_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "evaluate", _raise)
    words = ("fit", "--config", FLOAT, "--run_dir", tmp_path / "run", *TWO)
    assert runs.run(*words) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "training is done and kept in" in shown
    monkeypatch.undo()
    assert runs.run(*words, "--ckpt_path", "last") == 0
    assert runs.metrics(tmp_path / "run")["epochs"] == 2


def test_stream_survives_a_plot_that_fails(
    line: Line, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapt, "save_stream", _raise)
    stream = ("--stream.style", "cifar", "--stream.num_images", 10, "--stream.batch_size", 10)
    words = ("--config", FLOAT, "--ckpt_path", teacher, "--run_dir", tmp_path / "run", *stream)
    line("adapt", *words)
    assert runs.metrics(tmp_path / "run")["n_batches"] > 0


@pytest.mark.parametrize("module", ["qat.cli", "qat.cli.main"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_module_that_is_run_is_the_command_line(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "fitt"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(module, run_name="__main__")
    assert caught.value.code == 2
    assert "error: there is no command 'fitt'" in capsys.readouterr().err


def test_interrupt_of_a_worker_is_left_to_the_process_it_works_for(teacher: Path) -> None:
    data = VisionData(**_sources(), num_workers=1, batch_size=8)
    card = qat.load(teacher).card
    data.attach(card.preprocessing, 10)  # type: ignore[arg-type]
    batches = iter(data.val_dataloader())
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)  # type: ignore[arg-type]
    assert len(list(batches)) == 44  # a worker that dies of it would end the run


def _sources() -> dict[str, Any]:
    from qat.data.sources import digits

    return {"val": digits("test"), "train": digits("train")}


def test_interrupt_before_anything_began_has_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(session: Session) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "prepare", stop)
    assert main(["test", "--config", str(runs.ROOT / FLOAT)]) == 130

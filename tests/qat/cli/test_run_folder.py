"""The run folder: what is in it, what it refuses, and that it is enough to repeat the run."""

import contextlib
import csv
import json
import multiprocessing
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from qat.cli.curves import Curves, rows_before
from qat.cli.main import open_session
from qat.cli.run_folder import RunFolder
from qat.lightning.checkpoint_io import WholeFiles
from tests import runs

EVERY_RUN = {
    "command",
    "recipe",
    "seed",
    "seconds",
    "device",
    "torch_version",
    "coverage_macs",
    "size_bytes",
    "bops",
}


def _columns(folder: Path) -> dict[str, list[str]]:
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: [row[key] for row in rows if row[key]] for key in rows[0]}


def test_folder_has_the_name_asked_for_or_that_of_recipe_and_time() -> None:
    assert RunFolder.named("some/where", "recipe").path == Path("some/where")
    path = RunFolder.named(None, "recipe").path
    assert re.fullmatch(r"runs/recipe-\d{8}-\d{6}", str(path))


def test_runs_that_start_in_one_second_get_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20261128-193116")
    with ExitStack() as stack:
        folders = [stack.enter_context(RunFolder.named(None, "recipe").claimed()) for _ in range(3)]
        names = [str(folder.path) for folder in folders]
        first = "runs/recipe-20261128-193116"
        assert names == [first, f"{first}-2", f"{first}-3"]
        folders[0].write_metrics({})
    assert [path.name for path in Path("runs").iterdir()] == [Path(first).name]


def _hold(folder: Path, parent: Any) -> None:
    with RunFolder(folder).claimed():
        parent.send("ready")
        parent.recv()


@contextmanager
def held(folder: Path) -> Iterator[Any]:
    """Another process that has a folder within the block."""
    context = multiprocessing.get_context("fork")
    child, parent = context.Pipe()
    process = context.Process(target=_hold, args=(folder, parent))
    process.start()
    assert child.recv() == "ready"
    try:
        yield process
    finally:
        with suppress(OSError):  # it was killed
            child.send("end")
        process.join()


def test_folder_that_another_process_has_is_refused_in_one_line_until_it_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(tmp_path / "run") as process:
        words = ("--config", "configs/digits_teacher.yaml", "--run_dir", tmp_path / "run")
        assert runs.run("test", *words) == 1
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and f"is in use by process {process.pid} on" in line
        (tmp_path / "run" / "metrics.json").write_text("{}")
    with RunFolder(tmp_path / "run").claimed():
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.json"]


def test_lock_and_unfinished_files_of_a_killed_process_block_nothing(tmp_path: Path) -> None:
    with held(tmp_path / "run") as process:
        process.kill()
        process.join()
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / ".last.ckpt.1-2.part").write_text("half")
    assert (tmp_path / "run" / ".lock").exists()
    with RunFolder(tmp_path / "run").claimed() as folder:
        folder.write_metrics({})
    found = [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert found == ["metrics.json"]


def test_worker_that_outlives_its_process_does_not_hold_the_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    release = context.Event()
    with RunFolder(tmp_path / "run").claimed():
        worker = context.Process(target=release.wait, args=(60,))
        worker.start()
    with held(tmp_path / "run"):
        pass
    release.set()
    worker.join()


def test_run_dir_that_is_a_file_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        words = ("--config", "configs/digits_teacher.yaml", "--run_dir", path)
        assert runs.run("test", *words) == 1
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "cannot be used" in line and "--run_dir" in line


@pytest.mark.parametrize("content", ["", "seed_every", "- a\n", "a: [1,\n", "\0"])
def test_torn_recipe_is_told_as_such(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"is empty or damaged.*start anew"):
        RunFolder(tmp_path).read_recipe()


def test_torn_metrics_are_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"top1": 0.8')
    with pytest.raises(
        ValueError, match=r"metrics\.json' is damaged .*delete it to run this again"
    ):
        RunFolder(tmp_path).read_metrics()


def test_torn_last_row_of_the_curves_is_left_out_and_a_damaged_table_is_told(
    tmp_path: Path,
) -> None:
    table = tmp_path / "metrics.csv"
    table.write_text("epoch,step,train/loss\n0,0,3.0\n0,1")
    assert [row["step"] for row in rows_before(table, 4)] == ["0"]
    table.write_text("epoch,step,train/loss\n0,zero,3.0\n")
    with pytest.raises(ValueError, match="is damaged, so its curves cannot be continued"):
        rows_before(table, 4)


def test_curves_that_gain_a_column_keep_every_row(tmp_path: Path) -> None:
    curves = Curves(tmp_path / "metrics.csv", [])
    for step in range(3):
        curves.log_metrics({"loss": 1.0}, step)
        curves.save()
    curves.log_metrics({"top1": 0.5}, 2)
    curves.save()
    assert curves.path.read_text().split() == [
        "loss,step,top1",
        "1.0,0,",
        "1.0,1,",
        "1.0,2,",
        ",2,0.5",
    ]


def test_training_checkpoints_are_written_whole(tmp_path: Path) -> None:
    words = ("--config", "configs/digits_teacher.yaml", "--run_dir", str(tmp_path))
    with contextlib.chdir(runs.ROOT):
        trainer = open_session("fit", *words).trainer()
    assert isinstance(trainer.strategy.checkpoint_io, WholeFiles)


def test_new_folder_resumes_from_nothing(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "new").checkpoint_to_resume(None) is None


@pytest.mark.parametrize("trace", ["metrics.json", "checkpoints/last.ckpt"])
def test_folder_that_holds_a_run_is_refused_unless_it_is_continued(
    trace: str, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / trace).write_text("{}")
    with pytest.raises(ValueError, match=r"already holds a run; continue it with --ckpt_path last"):
        RunFolder(tmp_path).checkpoint_to_resume(None)


def test_checkpoint_to_resume_is_the_last_one_or_the_one_named(lsq_run: Path) -> None:
    folder = RunFolder(lsq_run)
    best = lsq_run / "checkpoints" / "best.ckpt"
    assert folder.checkpoint_to_resume("last") == lsq_run / "checkpoints" / "last.ckpt"
    assert folder.checkpoint_to_resume(str(best)) == best


def test_last_without_a_run_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint to continue in"):
        RunFolder(tmp_path).checkpoint_to_resume("last")
    with pytest.raises(ValueError, match=r"no checkpoint '.*gone\.ckpt'"):
        RunFolder(tmp_path).checkpoint_to_resume(str(tmp_path / "gone.ckpt"))


def test_resumed_csv_keeps_the_rows_before_the_step_it_resumes_from(tmp_path: Path) -> None:
    rows = "epoch,step,train/loss,val/top1\n0,0,3.0,\n0,3,,0.5\n1,4,2.0,\n"
    (tmp_path / "metrics.csv").write_text(rows)
    logger = RunFolder(tmp_path).logger(4)
    logger.log_metrics({"train/loss": 1.5, "epoch": 1}, step=4)
    logger.save()
    found = _columns(tmp_path)
    assert found["step"] == ["0", "3", "4"]
    assert found["train/loss"] == ["3.0", "1.5"]
    assert found["val/top1"] == ["0.5"]


def test_csv_of_a_new_run_starts_empty(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n0,0,3.0\n")
    logger = RunFolder(tmp_path).logger(None)
    logger.log_metrics({"train/loss": 1.5}, step=1)
    logger.save()
    assert _columns(tmp_path)["train/loss"] == ["1.5"]


def test_metrics_are_read_as_written_and_an_unwritable_item_leaves_the_old_file(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)
    folder.write_metrics({"top1": 0.8125, "layers": [{"layer": "a"}]})
    with pytest.raises(TypeError):
        folder.write_metrics({"top1": object()})
    assert folder.read_metrics() == {"top1": 0.8125, "layers": [{"layer": "a"}]}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_tracker_identity_stays_with_the_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = RunFolder(tmp_path / "a").tracker_id()
    assert RunFolder(tmp_path / "a").tracker_id() == first
    assert RunFolder(tmp_path / "b").tracker_id() != first


def test_fit_leaves_recipe_checkpoints_and_metrics(lsq_run: Path) -> None:
    found = {str(p.relative_to(lsq_run)) for p in lsq_run.rglob("*") if p.is_file()}
    assert found == {
        "config.yaml",
        "metrics.csv",
        "metrics.json",
        "oscillation.csv",
        "weights.csv",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
    }


def test_metrics_of_a_float_fit_hold_what_the_design_demands(teacher: Path) -> None:
    found = runs.metrics(teacher.parents[1])
    assert found.keys() >= EVERY_RUN | {"top1", "top5", "n_images"}
    assert (found["command"], found["recipe"], found["seed"]) == ("fit", "digits_teacher", 0)
    assert found["n_images"] == 360
    assert found["coverage_macs"] == 0
    assert found["size_bytes"] == 4 * found["num_parameters"]
    assert not found.keys() & {"top1_teacher", "flip_rate"}


@pytest.mark.parametrize("name", ["lsq", "binary"])
def test_metrics_of_a_distilled_fit_hold_what_the_design_demands(name: str, teacher: Path) -> None:
    found = runs.metrics(runs.student(name, teacher))
    assert found.keys() >= EVERY_RUN | {"top1", "top5", "n_images", "top1_teacher", "flip_rate"}
    assert found["top1_teacher"] == runs.metrics(teacher.parents[1])["top1"]
    assert 0.98 < found["coverage_macs"] < 1
    assert 0 < found["flip_rate"] < 1
    assert 0 < found["seconds"] < 600
    assert json.dumps(found, allow_nan=False)


def test_metrics_of_a_test_hold_what_the_design_demands_and_agree_with_fit(
    lsq_run: Path, tmp_path: Path
) -> None:
    config = ("--config", "configs/qat/digits_w4a4_lsq.yaml", "--run_dir", tmp_path / "test")
    checkpoint = lsq_run / "checkpoints" / "last.ckpt"
    assert runs.run("test", *config, "--ckpt_path", checkpoint) == 0
    found, fitted = runs.metrics(tmp_path / "test"), runs.metrics(lsq_run)
    assert found.keys() >= EVERY_RUN | {"top1", "top5", "n_images"}
    assert found["command"] == "test"
    for key in ("top1", "top5", "loss", "n_images", "coverage_macs", "size_bytes", "bops"):
        assert found[key] == fitted[key], key


def test_number_of_images_is_that_of_the_images_evaluated(lsq_run: Path, tmp_path: Path) -> None:
    config = ("--config", "configs/qat/digits_w4a4_lsq.yaml", "--run_dir", tmp_path / "test")
    words = ("--ckpt_path", lsq_run / "checkpoints" / "last.ckpt")
    assert runs.run("test", *config, *words, "--trainer.limit_val_batches", 0.2) == 0
    assert runs.metrics(tmp_path / "test")["n_images"] == 64


def test_csv_has_loss_accuracy_and_flip_rate_over_training(teacher: Path, tmp_path: Path) -> None:
    words = ("--model.teacher", teacher, "--trainer.max_epochs", 2)
    short = ("--trainer.limit_train_batches", 2, "--trainer.log_every_n_steps", 1)
    recipe = "configs/qat/digits_w4a4_lsq.yaml"
    found = runs.fit(recipe, tmp_path / "run", *words, *short)
    columns = _columns(tmp_path / "run")
    assert len(columns["train/loss"]) == len(columns["train/soft"]) == 4
    assert "train/hard" not in columns
    assert len(columns["val/top1"]) == 2
    assert float(columns["val/top1"][-1]) == found["top1"]
    rates = [float(rate) for rate in columns["weights/flip_rate"]]
    assert len(rates) == 2
    assert sum(rates) / 2 == pytest.approx(found["flip_rate"], rel=1e-6)


@pytest.mark.parametrize("name", ["lsq", "binary"])
@pytest.mark.slow
def test_saved_recipe_repeats_the_run(name: str, teacher: Path, tmp_path: Path) -> None:
    folder = runs.student(name, teacher)
    found = runs.fit(folder / "config.yaml", tmp_path / "again")
    expected = runs.metrics(folder)
    for items in (found, expected):
        for key in [key for key in items if key.startswith("seconds") or key == "recipe"]:
            del items[key]
    assert found == expected
    assert runs.weights(tmp_path / "again") == runs.weights(folder)

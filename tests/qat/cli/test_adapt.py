"""`train.py adapt`: contract of its files, resuming, kills, failing disks, the grid."""

import csv
import errno
import hashlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from qat import checkpoint as files
from qat.cli.adaptation import Adaptation
from qat.cli.session import Session
from qat.data.corrupted import Generated
from qat.data.protocols import Continual, ResetEachShift
from qat.data.sources import Source, digits
from qat.data.streams import Stream
from qat.reading import Unreadable
from qat.tta import Adapter, Guard
from qat.tta.store import Store
from tests import runs
from tests.qat.tta.common import METHODS, clean, shared

CORRUPTIONS = ["gaussian_noise", "contrast"]
QUIET = ("--trainer.enable_progress_bar", "false", "--num_threads", 1)
TENT = {"class_path": "qat.tta.Tent"}


@pytest.fixture
def recipe(tmp_path: Path, teacher: Path) -> Path:
    """Tent on a W4A4 model of digits over two corruptions, eight batches."""
    path = tmp_path / "recipe.yaml"
    protocol = {"class_path": "qat.data.protocols.Continual"}
    protocol["init_args"] = {"corruptions": CORRUPTIONS}  # type: ignore[assignment]
    stream = {"style": "cifar", "protocol": protocol, "num_images": 40, "batch_size": 10}
    recipe = {
        "base": str(runs.ROOT / "configs/digits_teacher.yaml"),
        "model": {"model": None, "teacher": str(teacher), "plan": "w4a4"},
        "method": TENT,
        "stream": {**stream, "save_every": 2},
    }
    recipe["model"]["quantizer"] = "qat.quantizers.Affine"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _adapt(config: Path, folder: Path, *words: object) -> dict[str, Any]:
    assert runs.run("adapt", "--config", config, "--run_dir", folder, *QUIET, *words) == 0
    return runs.metrics(folder)


def _rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "stream.csv", newline="") as file:
        return list(csv.DictReader(file))


def _lasting(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def _results(items: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in items.items() if "seconds" not in k and k != "resumed"}


def test_run_leaves_what_the_contract_says(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _adapt(recipe, tmp_path / "run")
    keys = {"error_mean", "error_worst", "error_source_mean", "table", "n_refused", "n_reset"}
    keys |= {"command", "recipe", "seed", "seconds", "device", "coverage_macs", "bops"}
    keys |= {"ece_mean", "error_class_mean", "n_backward", "seconds_ratio", "state_bytes"}
    keys |= {"memory_bytes", "memory_source_bytes"}
    assert found["memory_ratio"] > 1  # a backward pass needs what the forward pass left
    assert keys <= set(found)
    table = found["table"]
    assert [row["corruption"] for row in table] == CORRUPTIONS
    assert [row["n_images"] for row in table] == [40, 40]
    errors = [row["error"] for row in table]
    assert found["error_mean"] == pytest.approx(sum(errors) / 2)
    assert found["error_worst"] == max(errors) and found["n_backward"] == 80
    rows = _rows(tmp_path / "run")
    assert [int(row["position"]) for row in rows] == list(range(8))
    for name, share in zip(CORRUPTIONS, errors, strict=True):
        own = [float(row["error"]) for row in rows if row["domain"] == name]
        assert sum(own) / 4 == pytest.approx(share, abs=1e-5)
    assert (tmp_path / "run" / "stream.png").read_bytes().startswith(b"\x89PNG")
    assert "without adaptation" in capsys.readouterr().out


def test_run_in_which_no_batch_adapted_says_so_last(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--method", "qat.tta.SAR", "--method.margin", 1e-9)
    found = _adapt(recipe, tmp_path / "run", *words)
    expected = "of 8 batches 8 were skipped, with nothing in them worth a step"
    assert found["n_adapted"] == 0 and found["never_adapted"] == expected
    assert capsys.readouterr().out.splitlines()[-1] == f"no batch adapted: {expected}"
    words = ("--method", "qat.tta.Source")
    assert "never_adapted" not in _adapt(recipe, tmp_path / "source", *words)


def test_source_is_its_own_reference(recipe: Path, tmp_path: Path) -> None:
    found = _adapt(recipe, tmp_path / "run", "--method", "qat.tta.Source")
    assert found["error_mean"] == found["error_source_mean"]
    assert found["loss_worst"] == 0 and found["n_backward"] == 0 and found["state_bytes"] == 0
    assert found["memory_ratio"] == 1


def test_interrupted_run_continues_to_the_same_answers_bit_for_bit(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--method", "qat.tta.CoTTA", "--method.views", 2, "--guard", "{}")
    whole = _adapt(recipe, tmp_path / "whole", *words)
    exact, calls = Adapter.adapt, []

    def stop(self: Adapter, images: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return exact(self, images)

    monkeypatch.setattr(Adapter, "adapt", stop)
    arguments = ("adapt", "--config", recipe, "--run_dir", tmp_path / "run", *QUIET, *words)
    assert runs.run(*arguments) == 130
    monkeypatch.setattr(Adapter, "adapt", exact)
    found = _adapt(recipe, tmp_path / "run", *words, "--ckpt_path", "last")
    assert found["resumed"] and _results(found) == _results(whole)
    assert _lasting(_rows(tmp_path / "run")) == _lasting(_rows(tmp_path / "whole"))


def test_quantized_checkpoint_is_adapted_as_it_is(recipe: Path, tmp_path: Path) -> None:
    first = _adapt(recipe, tmp_path / "first")
    words = ("--ckpt_path", tmp_path / "first" / "model.ckpt")
    second = _adapt(recipe, tmp_path / "second", *words)
    assert second["table"] == first["table"]


@pytest.mark.slow
def test_run_on_a_checkpoint_stopped_at_its_start_continues_on_that_checkpoint(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _adapt(recipe, tmp_path / "first")

    def stop(session: Session) -> None:
        exact(session)
        raise KeyboardInterrupt

    exact = Session.keep_recipe
    other = (*QUIET, "--model.plan", "null")  # the checkpoint has W4A4
    words = ("adapt", "--config", recipe, "--run_dir", tmp_path / "run", *other)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "keep_recipe", stop)
        assert runs.run(*words, "--ckpt_path", tmp_path / "first" / "model.ckpt") == 130
    assert runs.run(*words, "--ckpt_path", "last") == 0
    assert runs.metrics(tmp_path / "run")["table"] == first["table"]


@pytest.mark.slow
def test_grid_compares_checkpoints_and_continues_on_each(
    recipe: Path, teacher: Path, tmp_path: Path
) -> None:
    files.save(shared(4), tmp_path / "w4a4.ckpt")
    parts = []
    for name, path in (("float", teacher), ("quantized", tmp_path / "w4a4.ckpt")):
        parts.append(tmp_path / f"{name}.yaml")
        parts[-1].write_text(yaml.safe_dump({"ckpt_path": str(path), "model": {"plan": None}}))
    grid = yaml.safe_dump({"model": [str(path) for path in parts]}, default_flow_style=True)
    words = ("--grid", grid, "--method", "qat.tta.Source")
    for _ in range(2):
        found = _adapt(recipe, tmp_path / "run", *words)
        assert [row["coverage_macs"] > 0 for row in found["table"]] == [False, True]
        for folder in ("quantized-0", "."):  # the second time, as if killed before its first save
            (tmp_path / "run" / folder / "metrics.json").unlink()


def test_protocol_that_resets_starts_the_method_anew(tmp_path: Path) -> None:
    images = Generated(digits("test"), "cifar")
    starts = []
    for protocol in (ResetEachShift(CORRUPTIONS), Continual(CORRUPTIONS)):
        stream = Stream(images, protocol, shared().card.preprocessing, 10, num_images=20)  # type: ignore[arg-type]
        folder = tmp_path / type(protocol).__name__
        folder.mkdir()
        found = _adaptation(folder, "tent", stream)
        found.run(lambda row: None)
        alone = Adapter(shared(), METHODS["tent"], clean(), guard=Guard()).adapt(stream[2].images)
        digest = hashlib.sha256(alone.logits.numpy().tobytes()).hexdigest()[:16]
        starts.append(_rows(folder)[2]["digest"] == digest)
    assert starts == [True, False]


def test_grid_quantizes_once_and_compares(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = []
    for name, settings in (("source", {"class_path": "qat.tta.Source"}), ("tent", TENT)):
        parts.append(tmp_path / f"{name}.yaml")
        parts[-1].write_text(yaml.safe_dump({"method": settings}))
    grid = yaml.safe_dump({"method": [str(path) for path in parts]}, default_flow_style=True)
    found = _adapt(recipe, tmp_path / "run", "--grid", grid)
    assert [row["method"] for row in found["table"]] == ["source", "tent"]
    assert len(list((tmp_path / "run" / "models").glob("*.ckpt"))) == 1
    source, tent = found["table"]
    assert source["error_source_mean"] == tent["error_source_mean"] == source["error_mean"]
    assert "Comparison" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "qat.tta.Norm"), "needs batch normalization"),
        (("--stream.num_images", 1000), "num_images must be 1 to 360"),
        (("--ckpt_path", "last"), "no run to continue"),
        (("--ckpt_path", "absent.ckpt"), "no checkpoint 'absent.ckpt'"),
        (("--stream.style", "photo"), "photo"),
        (("--method", "qat.tta.FOA", "--method.population", 2), "population must be at least 4"),
        (("--guard.probation", 0), "a guard needs"),
        (("--require_coverage", 1.01), "below the required 1.01"),
        (("--trainer.logger", "CometLogger"), "comet-ml"),  # a package that is not installed
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    words: tuple[object, ...],
    message: str,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert runs.run("adapt", "--config", recipe, "--run_dir", tmp_path / "run", *words) != 0
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line and "Traceback" not in line
    assert not (tmp_path / "run").exists(), "the corrected command would be refused"


def _stream(source: Source | None = None, num_images: int | None = 60) -> Stream:
    images = Generated(source or digits("test"), "cifar")
    protocol = Continual(CORRUPTIONS)
    return Stream(images, protocol, shared().card.preprocessing, 10, num_images=num_images)  # type: ignore[arg-type]


def _adaptation(folder: Path, name: str = "cotta", stream: Stream | None = None) -> Adaptation:
    adapter = Adapter(shared(), METHODS[name], clean(), guard=Guard())
    store = Store(folder, {"test": name})
    return Adaptation(adapter, stream or _stream(), store, folder / "stream.csv", 1)


@pytest.mark.filterwarnings("ignore:.*cannot be read:UserWarning")
def test_broken_files_are_refused_and_count_as_errors_of_both_models(tmp_path: Path) -> None:
    whole = digits("test")

    def read(index: int) -> Any:
        if index % 10 == 3:
            raise OSError("rotten")
        return whole.read(index)

    stream = _stream(Source(read, whole.labels, 10), None)
    found = _adaptation(tmp_path, "tent", stream)
    try:
        stream[0]
    except Unreadable:
        pytest.fail("the stream must flag, not raise")
    exact, finite = found.adapter.source, []

    def source(images: Any) -> Any:  # a logarithmic quantizer would make an index of a NaN
        finite.append(bool(images.isfinite().all()))
        return exact(images)

    found.adapter.source = source  # type: ignore[method-assign]
    found.run(lambda row: None)
    items = found.items()
    assert finite and all(finite)
    assert items["n_refused"] == 2 * 36 and items["n_images"] == 2 * 360
    assert [row["n_refused"] for row in items["table"]] == [36, 36]
    wrong = sum(row["n_images"] * row["error"] for row in items["table"])
    assert wrong == pytest.approx(int(found.scores.tensors["adapted.errors"].sum()))
    assert min(row[k] for row in items["table"] for k in ("error", "error_source")) >= 36 / 360
    assert found.scores.tensors["adapted.count"].sum() == 2 * 324  # answers with a confidence
    reasons = [row["reason"] for row in _rows(tmp_path) if row["n_refused"] != "0"]
    assert reasons and all("rotten" in reason for reason in reasons)


def test_failing_disk_does_not_stop_the_stream_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # goal R9
    found, whole = _adaptation(tmp_path / "a", "tent"), _adaptation(tmp_path / "b", "tent")
    for each in (found, whole):
        each.table.path.parent.mkdir()
    exact, calls = os.replace, []

    def fail(source: Any, target: Any) -> None:
        if str(target).endswith(".stream"):
            calls.append(1)
            if len(calls) in (3, 4, 5):
                raise OSError(errno.ENOSPC, "No space left on device")
        exact(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(UserWarning, match="could not be saved .*No space left"):
        found.run(lambda row: None)
    calls.extend([1] * 10)
    whole.run(lambda row: None)
    assert found.items()["n_unsaved"] == 3
    assert _lasting(_rows(tmp_path / "a")) == _lasting(_rows(tmp_path / "b"))


def _run_or_resume(folder: Path) -> None:
    found = _adaptation(folder)
    if any(folder.glob("*.stream")):
        found.resume()
    found.run(lambda row: None)
    (folder / "done").touch()


def _survive(folder: Path, kills: int, seed: int) -> int:
    """Run to the end in processes that are killed at random moments; the number of kills."""
    context = multiprocessing.get_context("fork")
    generator = random.Random(seed)
    killed = 0
    while not (folder / "done").exists():
        process = context.Process(target=_run_or_resume, args=(folder,))
        process.start()
        if killed < kills:
            time.sleep(generator.uniform(0.0, 0.35))
        else:
            process.join()
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            killed += 1
        process.join()
        store = Store(folder, {"test": "cotta"})
        if any(folder.glob("*.stream")):
            assert not store.load()[2], "a kill left a state that cannot be read"
    return killed


@pytest.mark.parametrize(
    "kills", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (50, 500))]
)
def test_killed_runs_lose_no_batch_and_answer_bit_for_bit(tmp_path: Path, kills: int) -> None:
    shared()  # goal R7; made before the processes are forked
    whole = tmp_path / "whole"
    whole.mkdir()
    _run_or_resume(whole)
    wanted, total, seed = _lasting(_rows(whole)), 0, 0
    while total < kills:
        folder = tmp_path / str(seed)
        folder.mkdir()
        total += _survive(folder, kills - total, seed)
        assert _lasting(_rows(folder)) == wanted
        seed += 1
    assert total >= kills

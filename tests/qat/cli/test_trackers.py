"""`trainer.logger`: every command tells its tracker what `metrics.json` says."""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from pytorch_lightning.loggers import CSVLogger

from tests import runs

COMMANDS: dict[str, dict[str, Any]] = {
    "fit": {"trainer": {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 2}},
    "test": {},
    "quantize": {"model": {"plan": "w4a4"}},
    "search": {
        "model": {"plan": "w8a8"},
        "data": {"num_calibration": 4},
        "search": {"like": "w4a4", "weights": [4, 8], "activations": [4, 8]},
    },
    "adapt": {
        "model": {"plan": "w4a4"},
        "method": {"class_path": "qat.tta.Tent"},
        "stream": {
            "style": "cifar",
            "protocol": {
                "class_path": "qat.data.protocols.Continual",
                "init_args": {"corruptions": ["gaussian_noise", "contrast"]},
            },
            "num_images": 20,
            "batch_size": 10,
        },
    },
}


def _recipe(command: str, teacher: Path, folder: Path) -> Path:
    """A recipe of a short run, with a tracker that writes into the folder."""
    recipe = {"base": str(runs.ROOT / "configs/digits_teacher.yaml"), **COMMANDS[command]}
    recipe["model"] = {**recipe.get("model", {}), "model": None, "teacher": str(teacher)}
    if "plan" in recipe["model"]:
        recipe["model"]["quantizer"] = "qat.quantizers.Affine"
    logger = {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": "."}}
    recipe["trainer"] = {**recipe.get("trainer", {}), "logger": logger}
    recipe["trainer"]["enable_progress_bar"] = False
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return path


def _run(command: str, teacher: Path, folder: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """What a command writes down, and what it tells a tracker."""
    path = _recipe(command, teacher, folder)
    assert runs.run(command, "--config", path, "--run_dir", folder, "--num_threads", 1) == 0
    (told,) = (folder / "lightning_logs").rglob("metrics.csv")
    with open(told, newline="") as file:
        return runs.metrics(folder), list(csv.DictReader(file))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_its_tracker_the_numbers_of_its_metrics(
    command: str, teacher: Path, tmp_path: Path
) -> None:
    written, told = _run(command, teacher, tmp_path / "run")
    numbers = {key: x for key, x in written.items() if type(x) in (int, float)}
    assert {"seconds", "size_bytes"} <= numbers.keys()
    found = {key: row[key] for row in told for key in numbers if row.get(key)}
    assert {key: float(x) for key, x in found.items()} == pytest.approx(numbers)


def test_adapt_tells_its_tracker_a_point_a_batch_and_an_error_a_corruption(
    teacher: Path, tmp_path: Path
) -> None:
    written, told = _run("adapt", teacher, tmp_path / "run")
    with open(tmp_path / "run" / "stream.csv", newline="") as file:
        batches = list(csv.DictReader(file))
    assert len(batches) == 4
    points = {int(row["step"]): row for row in told if row["stream/error"]}
    for batch in batches:
        point = points[int(batch["position"])]
        for key in ("error", "error_source", "n_refused", "n_backward", "seconds"):
            assert float(point[f"stream/{key}"]) == float(batch[key])
    errors = {row["corruption"]: row["error"] for row in written["table"]}
    last = next(row for row in told if row["error/contrast"])
    assert {name: float(last[f"error/{name}"]) for name in errors} == errors


@pytest.mark.parametrize("method", ["log_metrics", "finalize"])
def test_tracker_that_fails_is_left_out_and_the_stream_goes_on(
    method: str,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = []

    def fail(self: CSVLogger, *words: Any, **named: Any) -> None:
        calls.append(words)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(CSVLogger, method, fail)
    recipe = _recipe("adapt", teacher, tmp_path / "run")
    assert runs.run("adapt", "--config", recipe, "--run_dir", tmp_path / "run") == 0
    assert len(calls) == 1
    assert runs.metrics(tmp_path / "run")["n_images"] == 40
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("CSVLogger failed and is left out from here on: no route to host") == 1

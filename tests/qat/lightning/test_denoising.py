"""DiTs on the command line: fit, test, quantize and grids, with measures and images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import qat
from qat.card import expected_by
from qat.data.sources import digits
from qat.diffusion.judge import judge
from qat.lightning.data import VisionData
from qat.lightning.denoising import Denoising, NoisePrediction
from qat.quantizers import Phase, quantizers
from qat.train.losses import Objective
from tests import runs
from tests.qat.diffusion.common import tiny_dit

QUICK = {"sampling_steps": 2, "num_samples": 20, "num_images": 8, "num_times": 4}
QUIET = ("--trainer.enable_progress_bar", "false", "--num_threads", 1)
PARTS = runs.ROOT / "configs/dit/parts"


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a judge that has learned nothing."""
    path = tmp_path_factory.mktemp("judge") / "judge.ckpt"
    qat.save(judge(img_size=8, width=4, num_features=6), path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, verdict: Path) -> Path:
    """Run folder of a DiT after four steps."""
    folder = tmp_path_factory.mktemp("dit") / "run"
    recipe = _recipe(folder.parent / "dit.yaml", verdict)
    limits = ("--trainer.check_val_every_n_epoch", 1, *runs.SHORT)
    assert runs.run("fit", "--config", recipe, "--run_dir", folder, *limits) == 0
    return folder


PLANS = runs.ROOT / "configs/plans"


def _recipe(path: Path, verdict: Path, part: str | None = None, **changes: Any) -> Path:
    """A recipe; with a part, of a quantization to W4A4 by that method."""
    build = {"class_path": "qat.diffusion.build.dit"}
    build["init_args"] = {"img_size": 8, "patch_size": 4, "dim": 32, "depth": 1, "num_heads": 2}
    model = {"model": build, **changes.pop("model", {})}
    if part is not None:
        model["plan"] = str(PLANS / "dit_w4a4.yaml")
    recipe = {
        "base": [str(runs.ROOT / "configs/dit/digits_float.yaml")],
        "judge_config": None,
        "task": {
            "class_path": "qat.lightning.denoising.Denoising",
            "init_args": {"judge": str(verdict), **QUICK},
        },
        "model": model,
        **changes,
    }
    if part is not None:
        recipe["base"] += [str(PARTS / f"{part}.yaml")]
    path.write_text(yaml.safe_dump(recipe))
    return path


def _quantize(config: Path, folder: Path, *words: object) -> dict[str, Any]:
    assert runs.run("quantize", "--config", config, "--run_dir", folder, *QUIET, *words) == 0
    return runs.metrics(folder)


def _trained(trained: Path) -> dict[str, Any]:
    return {"model": {"model": None, "teacher": str(trained / "checkpoints/last.ckpt")}}


def test_fit_measures_noise_and_samples_and_its_checkpoint_loads(trained: Path) -> None:
    found = runs.metrics(trained)
    assert 0 < found["noise_error"] < 2 and 0 <= found["class_accuracy"] <= 1
    assert found["frechet"] > 0 and found["size_bytes"] == 4 * found["num_parameters"]
    assert (trained / "checkpoints/best.ckpt").exists()
    with Image.open(trained / "samples.png") as image:
        assert image.size == (10 * (8 + 2) + 2, 2 * (8 + 2) + 2)
    assert qat.load(trained / "checkpoints/last.ckpt").num_classes == 10


def test_quantize_writes_the_contract_and_both_grids_of_samples(
    trained: Path, verdict: Path, tmp_path: Path
) -> None:
    recipe = _recipe(tmp_path / "dit.yaml", verdict, "lrq", **_trained(trained))
    found = _quantize(recipe, tmp_path / "run")
    keys = {"noise_error", "class_accuracy", "frechet", "size_bytes", "noise_gap", "agreement"}
    keys |= {"sample_error", "noise_error_float", "seconds_calibration", "coverage_macs", "bops"}
    assert keys <= set(found)
    table = found["noise_error_by_time"]
    assert [(row["first"], row["last"]) for row in table] == [
        (0, 249), (250, 499), (500, 749), (750, 999)
    ]  # fmt: skip
    mean = sum(row["noise_gap"] for row in table) / 4
    assert found["noise_gap"] == pytest.approx(mean, rel=1e-5) and found["noise_gap"] > 0
    assert {"samples.png", "samples_float.png", "model.ckpt"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    model = qat.load(tmp_path / "run/model.ckpt")
    assert all(q.phase is Phase.QUANTIZE for _, q in quantizers(model))
    words = ("--config", recipe, "--ckpt_path", tmp_path / "run/model.ckpt")
    assert runs.run("test", *words, "--run_dir", tmp_path / "test") == 0
    again = runs.metrics(tmp_path / "test")
    for key in ("noise_error", "class_accuracy", "frechet"):
        assert again[key] == pytest.approx(found[key], rel=1e-5)


@pytest.mark.slow
def test_grid_compares_methods_on_the_same_noise(
    trained: Path, verdict: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(tmp_path / "dit.yaml", verdict, **_trained(trained))
    grid = {
        "bits": {
            bits: {"model": {"plan": str(PLANS / f"dit_{bits}.yaml")}} for bits in ("w8a8", "w3a4")
        },
        "method": [str(PARTS / f"{method}.yaml") for method in ("rtn", "hadamard")],
    }
    words = ("--grid", yaml.safe_dump(grid, default_flow_style=True), "--draws", 2)
    found = _quantize(recipe, tmp_path / "run", *words)
    rows = {(row["bits"], row["method"], row["seed"]): row for row in found["table"]}
    assert len(rows) == 8
    floats = {row["noise_error_float"] for row in rows.values()}
    assert len(floats) == 2, "one float result for each seed, the same for all methods"
    for method in ("rtn", "hadamard"):
        assert rows["w8a8", method, 0]["noise_gap"] < rows["w3a4", method, 0]["noise_gap"]
    assert "noise_error_float" in capsys.readouterr().out


@pytest.mark.slow
def test_judge_is_trained_once_in_the_run_folder(
    trained: Path, verdict: Path, tmp_path: Path
) -> None:
    quick = {"trainer": {"max_epochs": 1, "limit_train_batches": 2}}
    base = "configs/dit/digits_judge.yaml"
    training = runs.write_recipe(tmp_path / "judge.yaml", base, **quick)
    recipe = _recipe(
        tmp_path / "dit.yaml",
        verdict,
        "rtn",
        judge_config=str(training),
        **_trained(trained),
    )
    words = ("--task.judge", "null")
    assert 0 <= _quantize(recipe, tmp_path / "run", *words)["class_accuracy"] <= 1
    assert (tmp_path / "run/judge/checkpoints/last.ckpt").exists()
    assert "judge" in yaml.safe_load((tmp_path / "run/config.yaml").read_text())["judge_config"]


def _data() -> VisionData:
    data = VisionData(digits("test"), digits("train"), num_calibration=6)
    data.attach(expected_by(tiny_dit()), 10)
    return data


def test_calibration_batches_are_noisy_images_of_all_time_steps_with_their_classes() -> None:
    data = _data()
    (batch,) = Denoising(calibration_times=3).calibration_batches(data)
    x, times, labels = batch
    assert x.shape == (18, 1, 8, 8)
    assert times.sort().values.tolist() == [int((i + 0.5) * 1000 / 18) for i in range(18)]
    assert labels.tolist() == data.calibration_labels().tolist() * 3
    late = times > 900
    assert x[late].std() == pytest.approx(1.0, abs=0.15)


def test_labels_of_calibration_images_are_their_own() -> None:
    data = _data()
    images, labels = torch.cat(data.calibration_batches()), data.calibration_labels()
    source = digits("train")
    known = [torch.from_numpy(np.asarray(source[i][0]).copy()) for i in range(len(source))]
    for image, label in zip(images, labels, strict=True):
        pixels = ((image[0] + 1) * 127.5).round().byte()
        near = [i for i, other in enumerate(known) if torch.equal(other, pixels)]
        assert int(label) in {source[i][1] for i in near}


def test_class_dropout_withholds_classes_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    module = NoisePrediction(Denoising(class_dropout=0.5), model=tiny_dit())
    seen: list[int] = []
    module.model.label_embed.register_forward_pre_hook(lambda _, x: seen.extend(x[0].tolist()))
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    images, labels = torch.randn(400, 1, 8, 8), torch.zeros(400, dtype=torch.long)
    loss = module.training_step((images, labels), 0)
    assert loss.requires_grad
    assert set(seen) == {0, 5} and 150 < seen.count(5) < 250


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model.objective.soft", 0.5), "objective has no effect on a DiT"),
        (
            ("--task.class_dropout", 0.1, "--model.model.null_class", "false"),
            "needs a model with null_class",
        ),
    ],
)
def test_settings_without_effect_are_one_line_of_error(
    words: tuple[object, ...],
    message: str,
    verdict: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = _recipe(tmp_path / "dit.yaml", verdict, "rtn")
    command = ("quantize", "--config", recipe, "--run_dir", tmp_path / "run", *QUIET, *words)
    assert runs.run(*command) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and message in line


def test_a_judge_for_a_task_without_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--judge_config", "configs/dit/digits_judge.yaml", "--run_dir", tmp_path / "run")
    assert runs.run("fit", "--config", "configs/digits_teacher.yaml", *words) == 1
    assert "the task knows no judge" in capsys.readouterr().err


def test_objective_of_classifiers_may_be_left_at_its_default() -> None:
    assert Denoising().module(model=tiny_dit(), objective=Objective()).task == Denoising()

"""`search` on real digits: the files it leaves, the plan it writes, and what it refuses."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import qat
from qat import Plan
from qat.quantizers import quantizers
from tests import runs

QUIET = ("--num_threads", 1, "--trainer.enable_progress_bar", "false")


@pytest.fixture(scope="module")
def recipe(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that searches and quantizes a trained model of the digits."""
    path = tmp_path_factory.mktemp("search") / "pmq.yaml"
    return runs.write_recipe(
        path,
        "configs/ptq/parts/repq.yaml",
        model={"teacher": str(teacher), "plan": "w8a8"},
        data={
            "train": {"class_path": "qat.data.sources.digits", "init_args": {"split": "train"}},
            "val": {"class_path": "qat.data.sources.digits", "init_args": {"split": "test"}},
        },
        search={"like": "w4a4"},
    )


def _run(command: str, recipe: Path, folder: Path, *words: object) -> dict[str, Any]:
    words = ("--config", recipe, "--run_dir", folder, *words)
    assert runs.run(command, *words, *(QUIET if command in ("search", "quantize") else ())) == 0
    return runs.metrics(folder)


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def searched(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a search."""
    folder = tmp_path_factory.mktemp("search") / "run"
    _run("search", recipe, folder, "--data.num_calibration", 8)
    return folder


def test_search_leaves_plan_frontier_plots_and_metrics(searched: Path) -> None:
    names = {path.name for path in searched.iterdir()}
    assert {"config.yaml", "plan.yaml", "frontier.csv", "sensitivity.csv", "metrics.json"} <= names
    for name in ("sensitivity.png", "frontier.png"):
        assert (searched / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    found = runs.metrics(searched)
    assert found["command"] == "search" and found["seconds_sensitivity"] > 0
    assert found["seconds_frontier"] > 0
    assert 2 <= found["mean_bits_weight"] <= 8 and 2 <= found["mean_bits_activation"] <= 8
    assert found["bops"] == found["cost"] <= found["budget"]
    rows = [(float(r["bops"]), float(r["loss"])) for r in _rows(searched / "frontier.csv")]
    assert rows == sorted(rows) and [r[1] for r in rows] == sorted(r[1] for r in rows)[::-1]
    assert (found["cost"], pytest.approx(found["loss"])) in rows


def test_chosen_column_of_the_sensitivities_is_what_the_plan_says(searched: Path) -> None:
    plan = Plan.load(searched / "plan.yaml")
    chosen = [row for row in _rows(searched / "sensitivity.csv") if row["chosen"] == "1"]
    for row in chosen:
        spec = getattr(plan.match(row["module"]), row["operand"])
        assert spec.bits == int(row["bits"])
    assert len(chosen) == sum(len(rule.operands) for rule in plan)
    assert all(rule.reason for rule in plan)


@pytest.mark.slow
def test_quantize_and_fit_and_plan_read_the_plan_by_a_relative_path(
    recipe: Path, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    local = runs.ROOT / "searched_plan_of_a_test.yaml"
    local.write_text((searched / "plan.yaml").read_text())
    try:
        words = ("--model.plan", local.name)
        found = _run("quantize", recipe, tmp_path / "quantized", *words)
        assert found["bops"] == runs.metrics(searched)["bops"]
        trained = _run("fit", recipe, tmp_path / "fit", *words, *runs.SHORT)
        assert trained["bops"] == found["bops"]
        assert runs.run("plan", "--config", recipe, *words) == 0
    finally:
        local.unlink()
    assert f"{found['bops']:,}" in capsys.readouterr().out
    model = qat.load(tmp_path / "quantized" / "model.ckpt")
    widths = {q.spec.bits for _, q in quantizers(model)}
    assert len(widths) > 2


@pytest.mark.slow
def test_knee_is_taken_without_a_budget_and_bytes_and_labels_are_taken_too(
    recipe: Path, tmp_path: Path
) -> None:
    few = ("--data.num_calibration", 4, "--search.like", "null")
    knee = _run("search", recipe, tmp_path / "knee", *few)
    assert knee["budget"] is None
    labels = ("--search.metric.target", "labels", "--search.labels", "true")
    few = (*few, "--search.metric", "qat.search.metrics.FirstOrder", *labels)
    size = ("--search.measure", "size_bytes", "--search.budget", knee["size_bytes"] * 0.9)
    found = _run("search", recipe, tmp_path / "size", *few, *size)
    assert found["size_bytes"] <= knee["size_bytes"] * 0.9
    assert found["metric"] == "FirstOrder"


@pytest.mark.slow
def test_binary_components_are_a_legal_choice_that_trains(recipe: Path, tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    factory = {"class_path": "binaryvit.BinaryQuantizers"}
    binary.write_text(
        yaml.safe_dump(
            {
                "base": str(recipe),
                "model": {
                    "quantizer": factory,
                    "convert": "binaryvit.convert.react_",
                    "initialise": "qat.calibrate.calibrate",
                    "plan": "configs/plans/vit_w4a4.yaml",
                },
                "search": {"weights": [1, 4], "activations": [1, 4], "budget": 1.5e7, "like": None},
            }
        )
    )
    found = _run("search", binary, tmp_path / "run", "--data.num_calibration", 8)
    model_plan = Plan.load(tmp_path / "run" / "plan.yaml")
    widths = {rule.spec(op).bits for rule in model_plan for op in rule.operands}  # type: ignore[union-attr]
    assert widths == {1, 4}
    words = ("--model.plan", tmp_path / "run" / "plan.yaml", *runs.SHORT)
    trained = _run("fit", binary, tmp_path / "fit", *words)
    assert trained["bops"] == found["bops"]


@pytest.mark.slow
def test_latency_budget_reads_a_measured_table(recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "latency.csv"
    widths = (*range(2, 9), 32)
    lines = [f"*,{a},{b},{a * b}e-6" for a in widths for b in widths]
    path.write_text("site,left_bits,right_bits,seconds\n" + "\n".join(lines))
    words = ("--search.measure", "seconds", "--search.latency_table", path)
    words = (*words, "--data.num_calibration", 4, "--search.like", "null")
    found = _run("search", recipe, tmp_path / "run", *words, "--search.budget", 6e-4)
    assert 0 < found["cost"] <= 6e-4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--search.like", "null", "--search.budget", 1000),
         r"budget 1,000 cannot be met: the allowed widths reach [\d.,e+]+ to [\d.,e+]+"),
        (("--model.plan", "null"), "nothing to search: set model.plan"),
        (("--model.plan", "[]"), "the plan has no rules"),
        (("--search.metric", "TokenFisher", "--search.metric.target", "labels"),
         "needs the labels of the calibration images"),
        (("--search.weights", "[1,4]"), "offers 2 to 16 bits, got 1 for the weight"),
        (("--search.weights", "[9]"), "search.weights needs widths from 1 to 8"),
        (("--search.budget", 5e6), "search.budget and search.like both state the budget"),
        (("--search.measure", "seconds"), "needs search.latency_table"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value[:2])),
)  # fmt: skip
def test_what_cannot_be_searched_is_refused_in_one_line(
    words: tuple[object, ...],
    message: str,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = ("--config", recipe, "--run_dir", tmp_path / "run", "--data.num_calibration", 8)
    assert runs.run("search", *folder, *words, *QUIET) != 0
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and re.search(message, line), line
    assert not (tmp_path / "run" / "plan.yaml").exists()


def test_plan_shows_the_choices_of_a_grid(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for bits in (3, 8, 8):
        part = {"model": {"plan": f"w{bits}a{bits}"}}
        paths.append(tmp_path / f"w{bits}_{len(paths)}.yaml")
        paths[-1].write_text(yaml.safe_dump(part))
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        yaml.safe_dump({"base": str(recipe), "draws": 2, "grid": {"bits": list(map(str, paths))}})
    )
    assert runs.run("plan", "--config", grid) == 0
    shown = capsys.readouterr().out
    assert "w3_0" in shown and "w8_1" in shown and "w8_2" not in shown  # of equal cost


@pytest.mark.slow
def test_patchwise_bits_are_an_option_of_quantize_and_test(recipe: Path, tmp_path: Path) -> None:
    plain = _run("quantize", recipe, tmp_path / "plain")
    words = ("--patchwise.up", 2, "--patchwise.down", 2)
    spread = _run("quantize", recipe, tmp_path / "spread", *words)
    assert spread["bops"] < plain["bops"] and spread["logit_error"] != plain["logit_error"]
    model = ("--ckpt_path", tmp_path / "plain" / "model.ckpt", "--model.initialise", "null")
    again = _run("test", recipe, tmp_path / "test", *model[:2], *words)
    assert again["bops"] == spread["bops"] and again["top1"] == spread["top1"]

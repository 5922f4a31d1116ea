"""The ledger: every published number has a command, a band, and pages that say the same."""

import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import results

from ptq_init import repq_vit
from qat.cli import ledger
from qat.cli.commands import reproduce
from qat.cli.ledger import Question, Row
from qat.cli.recipe import load_recipe
from qat.cli.run_folder import RunFolder
from tests import runs

ROW = Row("digits", "LSQ", "fit --config qat/digits_w4a4_lsq", "top1", 0.01)
QUESTION = Question("How good is it?", "On digits.", {"top1": "top-1"}, (ROW,))
METRICS = {"seed": 0, "seconds": 1.0, "processor": "x", "torch_version": "2", "top1": 0.9}


def _runs(*values: float) -> list[dict[str, Any]]:
    return [{"name": "digits", "measures": {"top1": value}} for value in values]


@pytest.mark.parametrize(
    ("values", "band"),
    [((0.9,), 0.01), ((0.9, 0.905), 0.01), ((0.90, 0.95), 0.05), ((0.9, 0.9, 0.9), 0.01)],
)
def test_band_is_the_largest_of_errors_spread_and_the_least_one(
    values: tuple[float, ...], band: float
) -> None:
    found = ledger.expected(ROW, _runs(*values))
    assert found.band == pytest.approx(band)
    assert found.holds(found.value + 0.99 * band)
    assert not found.holds(found.value - 1.01 * band)


def test_row_without_a_run_and_row_that_does_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="no run of 'digits' is recorded"):
        ledger.expected(ROW, [])
    with pytest.raises(ValueError, match=r"no row 'digit'; did you mean 'digits'\?"):
        ledger.row_named("digit", [QUESTION])


def test_recorded_run_is_a_line_with_command_versions_and_measures(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    for _ in range(2):
        ledger.record(ROW, QUESTION, METRICS, path)
    first, second = ledger.runs(path)
    assert first == second == json.loads(path.read_text().splitlines()[0])
    assert first["measures"] == {"top1": 0.9} and first["command"] == ROW.command


def test_every_row_names_recipes_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_ASSETS", "/assets")
    names: list[str] = []
    for question in ledger.questions():
        for row in question.rows:
            names.append(row.name)
            words = row.command.split()
            for flag, value in pairwise(words):
                if flag == "--config":
                    assert load_recipe(value)
    assert len(names) == len(set(names))


def test_changed_constant_of_a_method_makes_its_row_fail(
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = f"quantize --config ptq/digits --model.teacher {teacher}"
    row = Row("repq", "RepQ-ViT", command, "logit_error", 0.005)
    recorded: list[dict[str, Any]] = []
    monkeypatch.setattr(ledger, "questions", lambda: [replace(QUESTION, rows=(row,))])
    monkeypatch.setattr(ledger, "runs", lambda: recorded)
    monkeypatch.setattr(
        ledger,
        "record",
        lambda row, _, metrics: recorded.append({"name": row.name, "measures": metrics}),
    )
    assert runs.run("reproduce", "repq", "--run_dir", tmp_path / "a", "--record", "true") == 0
    monkeypatch.setattr(repq_vit, "SMALLEST_SHARE", 2.0)
    assert runs.run("reproduce", "repq", "--run_dir", tmp_path / "b") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "'repq' lies outside its band: logit_error" in line
    assert runs.metrics(tmp_path / "a")["inside"] and not runs.metrics(tmp_path / "b")["inside"]


def test_commands_of_a_row_pass_files_on_inside_its_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "search --run_dir runs/mixed && quantize --bits runs/mixed/plan.yaml"
    row, told = Row("mixed", "PMQ", command, "top1", 0.01), []

    def run(words: list[str]) -> int:
        told.append(words)
        folder = Path(words[words.index("--run_dir") + 1])
        folder.mkdir(parents=True)
        RunFolder(folder).write_metrics({**METRICS, "device": "cpu"})
        return 0

    monkeypatch.setattr(ledger, "questions", lambda: [replace(QUESTION, rows=(row,))])
    monkeypatch.setattr(ledger, "runs", lambda: [{"name": "mixed", "measures": {"top1": 0.9}}])
    monkeypatch.setattr(reproduce, "main", run)
    assert runs.run("reproduce", "mixed", "--run_dir", tmp_path / "a") == 0
    mixed, last = str(tmp_path / "a/mixed"), str(tmp_path / "a/run")
    seed = ["--seed_everything", "0"]
    assert told == [
        ["search", "--run_dir", mixed, *seed],
        ["quantize", "--bits", f"{mixed}/plan.yaml", "--run_dir", last, *seed],
    ]


def _quick() -> list[str]:
    """Rows that a run has given in less than two minutes, on a processor."""
    return sorted({run["name"] for run in ledger.runs() if run["seconds"] < 120})


@pytest.mark.slow
@pytest.mark.skipif("LOWBIT_ASSETS" not in os.environ, reason="needs the folder LOWBIT_ASSETS")
@pytest.mark.parametrize("name", _quick())
def test_quick_row_still_holds(name: str, tmp_path: Path) -> None:
    assert runs.run("reproduce", name, "--run_dir", tmp_path / "run") == 0


def test_pages_are_what_the_recorded_runs_give(tmp_path: Path) -> None:
    page, readme = tmp_path / "results.md", tmp_path / "README.md"
    readme.write_text(results.README.read_text())
    results.write(page, readme)
    assert page.read_text() == results.PAGE.read_text(), "run python benchmarks/results.py"
    assert readme.read_text() == results.README.read_text(), "run python benchmarks/results.py"


def test_table_of_the_readme_has_at_most_eight_rows() -> None:
    for question in ledger.questions():
        assert len(question.readme) <= 8

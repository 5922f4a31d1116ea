"""YAML of people: a key twice is refused with its lines, wherever it stands."""

import re
from pathlib import Path

import pytest

from qat import Plan
from qat.cli.main import main
from qat.documents import read_yaml


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("a: 1\nb: 2\na: 3", "a", (1, 3)),
        ("model:\n  plan: x\nmodel:\n  model: null", "model", (1, 3)),
        ("a:\n  b: 1\n  b: 1", "b", (2, 3)),
        ("- x\n- {a: 1,\n   'a': 2}", "a", (2, 3)),
        ("a: {1: x, 2: y,\n  1: z}", "1", (1, 2)),
        ("x: &x {a: 1}\ny: *x\nx: 3", "x", (1, 3)),
    ],
)
def test_key_that_stands_twice_is_refused_with_both_lines(
    text: str, key: str, lines: tuple[int, int], tmp_path: Path
) -> None:
    path = _write(tmp_path / "r.yaml", text)
    message = rf"recipe '.*r\.yaml': key '{key}' stands on line {lines[0]} and again on line "
    with pytest.raises(ValueError, match=message + str(lines[1])):
        read_yaml(path, "recipe")


@pytest.mark.parametrize(
    "text",
    [
        "- {a: 1}\n- {a: 1}",
        "a: {a: {a: 1}}",
        "1: x\n'1': y",
        "base: &b {x: 1, y: 2}\nmore: {<<: *b, x: 3}",
        "&a [*a]",
    ],
)
def test_key_that_is_another_one_is_no_repetition(text: str, tmp_path: Path) -> None:
    read_yaml(_write(tmp_path / "r.yaml", text), "recipe")


def test_recipe_and_plan_with_a_key_twice_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _write(tmp_path / "r.yaml", "model: {plan: w4a4}\nseed_everything: 1\nmodel: {}")
    assert main(["fit", "--config", str(recipe)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"^error: recipe '.*r\.yaml': key 'model' stands on line 1 and again", line)
    plan = _write(tmp_path / "p.yaml", "- pattern: head\n  weight: {bits: 4}\n  weight: {bits: 8}")
    with pytest.raises(ValueError, match=r"plan file '.*p\.yaml': key 'weight' stands on line 2"):
        Plan.load(plan)

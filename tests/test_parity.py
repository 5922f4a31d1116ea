"""The benchmark of packed files keeps one row a model."""

import json
from pathlib import Path

import parity


def test_row_takes_the_place_of_the_one_of_the_same_model(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for name, top1 in (("a", 0.5), ("b", 0.6), ("a", 0.7)):
        parity.keep({"model": name, "top1": top1}, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"model": "a", "top1": 0.7}, {"model": "b", "top1": 0.6}]

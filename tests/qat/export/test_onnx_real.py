"""ONNX files of trained models, and of many families."""

import os
from typing import Any

import onnx_parity
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("LOWBIT_ASSETS" not in os.environ, reason="LOWBIT_ASSETS is not set"),
]


def _same(row: dict[str, Any]) -> None:
    assert not row.get("error") and not row["wrong"] and not row["faults"], row


@pytest.mark.parametrize("width", ["8", "4"])
def test_every_difference_of_the_real_vit_begins_with_a_value_on_its_threshold(width: str) -> None:
    (row,) = onnx_parity.vit(width, 8)
    _same(row)
    assert row["n_images"] == 8 and row["n_products_int_onnxruntime"] == row["n_products"] - 2


@pytest.mark.parametrize("name", onnx_parity.FAMILIES)
def test_a_model_of_each_family_is_exported_and_answers_the_same(name: str) -> None:
    for row in onnx_parity.families([name]):
        _same(row)


def test_other_models_and_grids_are_exported_and_answer_the_same() -> None:
    for row in onnx_parity.others():
        _same(row)

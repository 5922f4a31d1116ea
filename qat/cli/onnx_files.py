"""A model as an ONNX file in a run folder, its check, and what both say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qat import checkpoint as files
from qat.calibrate import Batch
from qat.card import card_of
from qat.cli.console import console
from qat.export import acceleration
from qat.export.measure import float_bytes, seconds_of_image
from qat.export.onnx import export_onnx
from qat.export.onnx_file import OnnxModel
from qat.export.runtimes import has_openvino, openvino
from qat.export.verify import Verification, verify

NAME = "model.onnx"
ROWS = {
    "bytes, ONNX file": ("size_onnx_bytes", "{:,}"),
    "of the same class, in OpenVINO": ("agreement_openvino", "{:.4f}"),
    "gap of logits in OpenVINO, worst": ("logit_gap_openvino", "{:.2g}"),
}


def write(model: nn.Module, path: Path) -> dict[str, Any]:
    """Write the ONNX file, say which of its products run on integers, and what it saves.

    Raises:
        ValueError: If the model cannot be exported.
    """
    export_onnx(model, path)
    found = acceleration.products(model, path)
    console.print(acceleration.table(found))
    for line in acceleration.slow(found):
        console.print(line, highlight=False)
    recipe = card_of(model).recipe
    assert recipe is not None  # checkpoints hold one
    float_model = files.build_model(recipe)
    return {
        "size_onnx_bytes": path.stat().st_size,
        "size_float_bytes": float_bytes(float_model),
        **seconds_of_image(float_model, OnnxModel(path)),
        **acceleration.items(found),
    }


def check(
    model: nn.Module, path: Path, batches: Sequence[Batch]
) -> tuple[Verification, dict[str, Any]]:
    """The file in ONNX Runtime, and in OpenVINO where that is installed, beside its model.

    Returns:
        What was found in ONNX Runtime, and what `metrics.json` holds of both.

    Raises:
        ValueError: If OpenVINO computes something else.
    """
    model = model.cpu().eval()
    found = verify(model, OnnxModel(path), batches)
    if not has_openvino():
        return found, found.items()
    other = verify(model, OnnxModel(path, openvino), batches)
    try:
        other.require_same()
    except ValueError as error:
        raise ValueError(f"in OpenVINO {error}") from None
    keys = ("agreement", "logit_gap", "n_gaps", "n_faults")
    return found, found.items() | {f"{key}_openvino": other.items()[key] for key in keys}

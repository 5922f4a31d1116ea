"""A model as a packed file in a run folder, its check, and what both say."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from qat import checkpoint as files
from qat import runtime
from qat.calibrate import Batch
from qat.card import card_of
from qat.export.measure import float_bytes, seconds_of_image
from qat.export.pack import export_packed
from qat.export.verify import Verification, verify

NAME = "model.lowbit"
ROWS = {
    "bytes, float (safetensors)": ("size_float_bytes", "{:,}"),
    "bytes, packed file": ("size_packed_bytes", "{:,}"),
    "seconds an image, float (torch)": ("seconds_per_image_float", "{:.5f}"),
    "seconds an image, exported (without torch)": ("seconds_per_image", "{:.5f}"),
    "images compared with the simulated model": ("n_images", "{:,}"),
    "of the same class": ("agreement", "{:.4f}"),
    "gap of logits, median": ("logit_gap_median", "{:.2g}"),
    "gap of logits, worst": ("logit_gap", "{:.2g}"),
    "images with a gap beyond rounding": ("n_gaps", "{:,}"),
    "of them not from a value on its threshold": ("n_faults", "{:,}"),
    "codes compared, given the same values": ("n_codes", "{:,}"),
    "of them other, the value on its threshold": ("n_codes_on_threshold", "{:,}"),
    "gap of logits by 16-bit numbers, worst": ("logit_gap_half", "{:.2g}"),
}


def write(model: nn.Module, path: Path, *, half: bool = False) -> dict[str, Any]:
    """Write the packed file, and say what it saves.

    Raises:
        ValueError: If the model cannot be packed.
    """
    export_packed(model, path, half=half)
    recipe = card_of(model).recipe
    assert recipe is not None  # the export of a model without one has failed
    float_model = files.build_model(recipe)
    return {
        "size_packed_bytes": path.stat().st_size,
        "size_float_bytes": float_bytes(float_model),
        **seconds_of_image(float_model, runtime.load(path)),
    }


def check(model: nn.Module, path: Path, batches: Iterable[Batch]) -> Verification:
    """The packed file beside the model it came from."""
    return verify(model.cpu().eval(), runtime.load(path), batches)

"""Blocks as one operation: the same numbers as the operations one by one, or not used at all."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from binaryvit import BinaryQuantizers
from binaryvit.asm import DynamicShift, ScaledShift, StandardizedShift, StaticShift
from binaryvit.convert import react_
from qat import convert_, kernels, runtime
from qat.export.pack import export_packed
from qat.runtime import REFERENCE
from tests.conftest import make_tiny_vit
from tests.qat.common import plan
from tests.qat.export.common import student

needs_kernels = pytest.mark.skipif(
    not kernels.instruction_sets(), reason="built without a C++ compiler"
)


def _file(
    folder: Path,
    images: Tensor,
    shift: type = StaticShift,
    convert: Callable[..., object] = convert_,
    **model_args: object,
) -> Path:
    size = {"embed_dim": 128, "num_heads": 2} | model_args
    model = student(plan(1), BinaryQuantizers(shift=shift), images, convert, make_tiny_vit(**size))
    for name, parameter in model.named_parameters():
        if name.endswith("shift"):  # thresholds that GELU reaches on both of its sides
            parameter.data.copy_(torch.randn_like(parameter) * 0.1)
    export_packed(model, folder / "model.lowbit")
    return folder / "model.lowbit"


def _is_fused(model: runtime.Model) -> list[bool]:
    return [block.fused is not None for block in model.blocks]


def _require_bits_of_operations(path: Path, images: Tensor) -> None:
    """Refuse a file whose fused blocks give other bits than their operations one by one."""
    model = runtime.load(path)
    assert _is_fused(model) == [True, True]
    seen: list[str] = []
    one_by_one = model(images.numpy(), lambda grid, _: seen.append(grid))
    assert seen
    for threads in (2, 1):
        kernels.set_threads(threads)
        np.testing.assert_array_equal(model(images.numpy()), one_by_one)


@needs_kernels
@pytest.mark.parametrize("name", kernels.instruction_sets())
@pytest.mark.parametrize("shift", [StaticShift, ScaledShift, StandardizedShift])
def test_fused_blocks_give_the_bits_of_their_operations(
    name: str, shift: type, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWBIT_KERNELS", name)
    _require_bits_of_operations(_file(tmp_path, images, shift), images)


OTHERS = [
    (DynamicShift, react_, {}),
    (StaticShift, react_, {"num_heads": 4}),
    (DynamicShift, convert_, {}),  # thresholds follow the image, a GELU between the layers
    (StaticShift, convert_, {"num_heads": 4}),  # heads of 32
    (DynamicShift, react_, {"embed_dim": 60, "num_heads": 3}),  # rows that fill no register
]


@needs_kernels
@pytest.mark.parametrize("name", kernels.instruction_sets())
@pytest.mark.parametrize(("shift", "convert", "model_args"), OTHERS)
def test_blocks_with_floats_between_layers_give_the_bits_of_their_operations(
    name: str,
    shift: type,
    convert: Callable[..., object],
    model_args: dict[str, object],
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOWBIT_KERNELS", name)
    path = _file(tmp_path, images, shift, convert, **model_args)
    _require_bits_of_operations(path, images)
    expected = runtime.load(path, REFERENCE)(images.numpy())
    np.testing.assert_allclose(runtime.load(path)(images.numpy()), expected, atol=2e-5)


@needs_kernels
@pytest.mark.parametrize(
    "model_args", [{"init_values": 0.5}, {"qk_norm": True}, {"scale_mlp_norm": True}]
)
def test_other_blocks_run_one_by_one(
    model_args: dict[str, object], images: Tensor, tmp_path: Path
) -> None:
    path = _file(tmp_path, images, **model_args)
    model = runtime.load(path)
    assert _is_fused(model) == [False, False]
    found, expected = (one(images.numpy()) for one in (model, runtime.load(path, REFERENCE)))
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_without_kernels_numpy_runs_the_file(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _file(tmp_path, images)
    expected = runtime.load(path, REFERENCE)(images.numpy())
    monkeypatch.setenv("LOWBIT_KERNELS", "numpy")
    np.testing.assert_array_equal(runtime.load(path)(images.numpy()), expected)


@needs_kernels
def test_a_block_whose_heads_fill_no_words_is_refused() -> None:
    ones, bits = np.ones(32, np.float32), np.zeros((32, 1), np.uint64)
    limits = np.zeros(32, np.int32)
    norm, layer = (ones, ones, ones), (bits, ones, ones)
    bounded = (bits, limits, limits)
    block = kernels.PlainBlock(
        norm, bounded, (limits, limits), layer, norm, bounded, layer, 1, 1e-6, 1.0, 1.0
    )
    prepare = kernels.loader.operations_of(kernels.instruction_sets()[0])["prepare_plain_block"]
    with pytest.raises(ValueError, match="dim must divide by 64"):
        prepare(block)


@needs_kernels
def test_a_block_whose_layers_do_not_follow_each_other_is_refused() -> None:
    ones, bits = np.ones(32, np.float32), np.zeros((32, 1), np.uint64)
    layer = kernels.BinaryLayer(ones, None, bits, ones, None, None)
    norm = (ones, ones)
    vectors = np.ones(96, np.float32)
    block = kernels.BinaryBlock(
        norm, layer, vectors, None, None, layer, norm, layer, layer, 1, 1e-6, 1e-5, 1.0, 1.0
    )
    prepare = kernels.loader.operations_of(kernels.instruction_sets()[0])["prepare_binary_block"]
    with pytest.raises(ValueError, match="do not fit 1 heads"):
        prepare(block)

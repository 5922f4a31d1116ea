"""A simulated model, its packed file, and the runtime: the same numbers."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qat
from binaryvit import BinaryQuantizers
from binaryvit.convert import react_
from qat import Plan
from qat.export.pack import export_packed, packed_bytes
from qat.packed import read
from qat.quantizers import LSQ, Affine, Log2, LogSqrt2, PerOperand, TanQ
from tests.conftest import make_tiny_vit
from tests.qat.common import FACTORIES, SHIFTS, distilled_deit, plan, swin
from tests.qat.export.common import logits, packed, student

EDGES = [
    {"pattern": "patch_embed.proj", "weight": {"bits": 8, "granularity": "per_channel"},
     "input": {"bits": 8}},
    {"pattern": "head", "weight": {"bits": 8, "granularity": "per_channel"}, "input": {"bits": 8}},
]  # fmt: skip


def _same(model: nn.Module, images: Tensor, folder: Path) -> None:
    """The runtime gives the logits of the simulated model, and a reloaded model their very bits."""
    expected = logits(model, images)
    found = packed(model, folder)(images.numpy())
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)
    again = qat.load(folder / "model.lowbit")
    assert (logits(again, images) == expected).all()
    assert packed_bytes(model) == (folder / "model.lowbit").stat().st_size


@pytest.mark.parametrize("factory", FACTORIES)
def test_plain_models(factory: str, images: Tensor, tmp_path: Path) -> None:
    bits = 1 if factory.startswith("binary") else 4
    _same(student(plan(bits), FACTORIES[factory], images), images, tmp_path)


@pytest.mark.parametrize("shift", SHIFTS)
def test_react_models(shift: type, images: Tensor, tmp_path: Path) -> None:
    model = student(plan(1), BinaryQuantizers(shift=shift), images, react_)
    _same(model, images, tmp_path)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("factory", [LSQ, Affine])
def test_uniform_plans(bits: int, factory: type, images: Tensor, tmp_path: Path) -> None:
    wanted = Plan.uniform(bits, bits) if factory is Affine else plan(bits)
    _same(student(wanted, factory, images), images, tmp_path)


def test_mixed_plan_with_binary_blocks_and_edges_of_eight_bits(
    images: Tensor, tmp_path: Path
) -> None:
    wide = {"weight": {"bits": 3, "granularity": "per_channel"}, "input": {"bits": 1}}
    rules = [
        *EDGES,
        {"pattern": "blocks.0.mlp.fc1", **wide},
        {"pattern": "blocks.0.mlp.fc2", "weight": {"bits": 1}, "input": {"bits": 4}},
        {"pattern": "blocks.1.attn", "query": {"bits": 1}, "key": {"bits": 4},
         "attention": {"bits": 4, "signed": False}, "value": {"bits": 1}},
        {"pattern": "blocks.1.attn.qkv", "weight": {"bits": 4}},
        *plan(1).to_list(),
    ]  # fmt: skip
    _same(student(Plan.from_list(rules), BinaryQuantizers(), images), images, tmp_path)


@pytest.mark.parametrize(
    "attention",
    [partial(LogSqrt2, zero=zero) for zero in ("none", "extra", "last")] + [Log2, TanQ],
)
def test_tables_of_attention_maps(attention: type, images: Tensor, tmp_path: Path) -> None:
    _same(student(Plan.uniform(4, 4), PerOperand(attention=attention), images), images, tmp_path)


SHAPES = {
    "average": {"global_pool": "avg", "class_token": False},
    "average-beside-class-token": {"global_pool": "avg"},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "layer-scale": {"init_values": 0.5, "qk_norm": True, "scale_attn_norm": True},
    "pre-norm": {"pre_norm": True, "scale_mlp_norm": True, "pos_embed": "none"},
    "no-biases": {"qkv_bias": False, "proj_bias": False},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_vision_transformers(shape: str, images: Tensor, tmp_path: Path) -> None:
    model = make_tiny_vit(**SHAPES[shape])
    for name, parameter in model.named_parameters():
        if "norm" in name or "token" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model = student(plan(1), BinaryQuantizers(), images, model=model)
    _same(model, images, tmp_path)


def test_distilled_deit_answers_with_the_mean_of_its_heads(images: Tensor, tmp_path: Path) -> None:
    _same(student(plan(4), LSQ, images, model=distilled_deit()), images, tmp_path)


def test_half_precision_narrows_all_but_codes_and_single_numbers(
    images: Tensor, tmp_path: Path
) -> None:
    model = student(plan(1), BinaryQuantizers(), images)
    found = packed(model, tmp_path, half=True)(images.numpy())
    for name, value in read(tmp_path / "model.lowbit").tensors.items():
        assert value.dtype in (np.uint8, np.float16) or value.size == 1, name
    again = logits(qat.load(tmp_path / "model.lowbit"), images)
    np.testing.assert_allclose(found, again, atol=2e-6, rtol=0)
    assert packed_bytes(model, half=True) == (tmp_path / "model.lowbit").stat().st_size


def test_other_models_are_refused_by_name(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a SwinTransformer; .*ONNX"):
        export_packed(swin(), tmp_path / "model.lowbit")


def test_a_part_that_the_runtime_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    model = make_tiny_vit(act_layer="relu")
    with pytest.raises(ValueError, match=r"'blocks.0.mlp.act' is a ReLU.*ONNX"):
        export_packed(model, tmp_path / "model.lowbit")
    with pytest.raises(ValueError, match=r"pools by 'max'.*ONNX"):
        export_packed(make_tiny_vit(global_pool="max"), tmp_path / "model.lowbit")


def test_an_uncalibrated_model_is_refused(tmp_path: Path) -> None:
    model = make_tiny_vit()
    qat.convert_(model, plan(4), LSQ)
    with pytest.raises(ValueError, match="is not calibrated"):
        export_packed(model, tmp_path / "model.lowbit")
    assert packed_bytes(model) > 0

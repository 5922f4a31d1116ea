"""An ONNX file answers as its model does, says what it holds, and a broken one is found out."""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import qat
from binaryvit import BinaryQuantizers
from binaryvit.asm import DynamicShift
from qat import Plan
from qat.export import acceleration
from qat.export.classifier import OnnxClassifier
from qat.export.onnx import export_onnx
from qat.export.onnx_file import OnnxModel
from qat.export.verify import verify
from qat.plan import load_plan
from qat.preprocessing import Preprocessing
from qat.quantizers import LSQ, Affine, DynamicToken, LogSqrt2, PerOperand, TanQ, TwinLog
from qat.transforms.linear import Hadamard, Transforms
from tests.conftest import make_tiny_vit
from tests.qat.export.common import student

TABLES = PerOperand(attention=LogSqrt2, default=LSQ, weight=TwinLog, input=DynamicToken)
SIGNED = {"bits": 8}
WIDTHS = Plan.from_list(
    [
        {"pattern": "patch_embed.proj", "weight": {"bits": 16, "signed": False}},
        {"pattern": "*.qkv", "weight": {**SIGNED, "granularity": "per_channel"},
         "input": {"bits": 3, "granularity": "per_channel", "signed": False}},
        {"pattern": "*.proj", "weight": {"bits": 3}, "input": {"bits": 12}},
        {"pattern": "*.fc1", "weight": {"bits": 5, "signed": False}, "input": {"bits": 16}},
        {"pattern": "*.attn", "query": {**SIGNED, "granularity": "per_channel"}, "key": SIGNED,
         "attention": {"bits": 2, "signed": False}, "value": {"bits": 7}},
    ]
)  # fmt: skip


def tables() -> Plan:
    """Weights on twin grids, inputs by token, attention maps on a logarithmic grid."""
    layer = {"weight": {"bits": 4, "signed": False, "granularity": "per_channel"}, "input": SIGNED}
    maps = dict.fromkeys(("query", "key", "value"), SIGNED)
    maps["attention"] = {"bits": 3, "signed": False}
    return Plan.from_list([{"pattern": "blocks.*.attn", **maps}, {"pattern": "blocks.*", **layer}])


def rotated(model: nn.Module) -> None:
    """Turn the input of one layer."""
    signs = torch.where(torch.arange(64) % 3 > 0, 1, -1)
    model.get_submodule("blocks.0.mlp.fc1").transform_(Transforms(Hadamard(signs)))  # type: ignore[operator]


def made(kind: str, images: Tensor) -> nn.Module:
    """A calibrated model of one block."""
    model = make_tiny_vit(depth=1)
    match kind:
        case "uniform":
            return student(load_plan("w8a8"), Affine, images, model=model)
        case "widths":
            return student(WIDTHS, Affine, images, model=model)
        case "binary":
            shifts = BinaryQuantizers(shift=DynamicShift)
            return student(load_plan("w1a1", False), shifts, images, model=model)
    qat.convert_(model, tables(), TABLES)
    rotated(model)
    qat.calibrate(model, [images])
    return model.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models and their files, each exported once."""
    folder, known = tmp_path_factory.mktemp("onnx"), {}

    def file(kind: str) -> tuple[nn.Module, Path]:
        if kind not in known:
            torch.manual_seed(0)
            model = made(kind, torch.randn(8, 1, 8, 8))
            export_onnx(model, folder / f"{kind}.onnx")
            known[kind] = model, folder / f"{kind}.onnx"
        return known[kind]

    return file


KINDS = ["uniform", "widths", "tables", "binary"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_grid_and_every_answer_is_that_of_the_model(kind: str, files: Any) -> None:
    """Codes are those of the model for the same values, and logits differ by rounding alone."""
    model, path = files(kind)
    found = verify(model, OnnxModel(path), [torch.randn(11, 1, 8, 8)])
    found.require_same()
    assert found.num_codes > 10_000 and not found.wrong
    assert len(OnnxModel(path).grids) == sum(1 for _ in qat.quantizers.quantizers(model))


class Windowed(nn.Module):
    """Windows of an image one below the other, and a table of no image, as Swin has them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(3, 4))
        self.positions, self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def count(self, images: Tensor) -> int:
        return images.shape[0]

    def forward(self, images: Tensor) -> Tensor:
        windows = images.reshape(-1, 3, 4) + self.positions(self.table)
        return self.head(self.mix(windows).reshape(self.count(images), -1, 4).mean(1))


def test_a_difference_is_traced_where_an_image_has_several_rows_or_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    seen = Preprocessing((1, 4, 6), (0.0,), (1.0,), "bilinear", 1.0, "center")
    model = qat.adopt(Windowed(), preprocessing=seen)
    qat.convert_(model, load_plan("w8a8"), Affine)
    qat.calibrate(model, [images := torch.randn(3, 1, 4, 6)])
    export_onnx(model.eval(), tmp_path / "right.onnx")
    verify(model, OnnxModel(tmp_path / "right.onnx"), [images]).require_same()
    answers = OnnxClassifier(tmp_path / "right.onnx")(images)
    assert torch.allclose(answers, model(images), atol=1e-5)
    _altered(tmp_path / "right.onnx", tmp_path / "wrong.onnx", "positions.bias")
    found = verify(model, OnnxModel(tmp_path / "wrong.onnx"), [images])
    assert [one.grid for one in found.faults] == ["mix.input_quantizer"] * 3


class Counting(Windowed):
    """Asks for a number of images, which torch takes for a constant."""

    def count(self, images: Tensor) -> int:
        return len(images)


def test_a_model_that_would_take_one_size_of_batch_is_refused(tmp_path: Path) -> None:
    seen = Preprocessing((1, 4, 6), (0.0,), (1.0,), "bilinear", 1.0, "center")
    model = qat.adopt(Counting(), preprocessing=seen).eval()
    with pytest.raises(ValueError, match=r"batches of 2 only.*use images\.shape\[0\]"):
        export_onnx(model, tmp_path / "fixed.onnx")
    assert not (tmp_path / "fixed.onnx").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_has_standard_operators_names_of_modules_and_nothing_of_this_machine(
    kind: str, files: Any
) -> None:
    _, path = files(kind)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(one.domain, one.version) for one in proto.opset_import] == [("", 21)]
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names)
    assert "blocks.0.attn.qk/MatMul" in names and "blocks.0.mlp.fc1/MatMul" in names
    assert b"site-packages" not in path.read_bytes() and b"/qat/" not in path.read_bytes()


def test_weights_are_integers_and_narrow_ones_take_4_bits(files: Any) -> None:
    _, path = files("widths")
    types = {one.name: one.data_type for one in onnx.load(path).graph.initializer}
    form = onnx.TensorProto
    assert types["blocks.0.attn.qkv.weight_quantizer.grid.codes"] == form.INT8
    assert types["blocks.0.attn.proj.weight_quantizer.grid.codes"] == form.INT4
    assert types["blocks.0.mlp.fc1.weight_quantizer.grid.codes"] == form.UINT8
    assert types["patch_embed.proj.weight_quantizer.grid.codes"] == form.INT32
    assert not any(name.endswith(("qkv.weight", "fc1.weight")) for name in types)


def test_equal_steps_become_standard_quantization_of_all_operands(files: Any) -> None:
    model, path = files("uniform")
    counts = Counter(node.op_type for node in onnx.load(path).graph.node)
    operands = list(qat.quantizers.quantizers(model))
    weights = sum(name.endswith("weight_quantizer") for name, _ in operands)
    assert counts["QuantizeLinear"] == len(operands) - weights
    assert counts["DequantizeLinear"] == len(operands)
    assert not counts["Clip"] and not counts["Round"]


def test_products_of_8_bits_run_on_integers_in_onnx_runtime(files: Any) -> None:
    """All but the convolution, which ONNX Runtime computes in float, and that is said."""
    found = acceleration.products(*files("uniform"))
    assert acceleration.items(found)["n_products_int_onnxruntime"] == len(found) - 1 == 7
    assert [one.node for one in found if not one.runtimes["ONNX Runtime"]] == [
        "patch_embed.proj/Conv"
    ]
    assert "1 of 8 products in float, such as patch_embed.proj/Conv" in next(
        acceleration.slow(found)
    )


def test_products_of_16_bits_of_channels_and_of_tables_are_said_to_run_in_float(
    files: Any,
) -> None:
    assert {"blocks.0.mlp.fc1/MatMul", "blocks.0.attn.qkv/MatMul"} <= _slow(*files("widths"))
    assert "blocks.0.attn.av/MatMul" in _slow(*files("tables"))


def _slow(model: nn.Module, path: Path) -> set[str]:
    return {
        one.node for one in acceleration.products(model, path) if not any(one.runtimes.values())
    }


@pytest.mark.parametrize(
    ("value", "blamed"),
    [
        ("blocks.0.mlp.fc1.input_quantizer.grid.scale", "blocks.0.mlp.fc1.input_quantizer"),
        ("blocks.0.attn.qkv.weight_quantizer.grid.scale", "blocks.0.attn.qkv.weight_quantizer"),
        ("blocks.0.attn.qk.right_quantizer.grid.scale", "blocks.0.attn.qk.right_quantizer"),
    ],
)
def test_a_scale_that_was_changed_in_the_file_is_found_and_named(
    value: str, blamed: str, files: Any, tmp_path: Path
) -> None:
    model, path = files("uniform")
    _altered(path, tmp_path / "altered.onnx", value)
    found = verify(model, OnnxModel(tmp_path / "altered.onnx"), [torch.randn(8, 1, 8, 8)])
    assert list(found.wrong) == [blamed]
    with pytest.raises(ValueError, match=f"the first in '{blamed}'"):
        found.require_same()


def test_another_number_that_was_changed_is_traced_to_the_first_grid_behind_it(
    files: Any, tmp_path: Path
) -> None:
    model, path = files("uniform")
    _altered(path, tmp_path / "altered.onnx", "pos_embed")
    found = verify(model, OnnxModel(tmp_path / "altered.onnx"), [torch.randn(8, 1, 8, 8)])
    assert {one.grid for one in found.faults} == {"blocks.0.attn.qkv.input_quantizer"}


def _altered(path: Path, other: Path, name: str) -> None:
    proto = onnx.load(path)
    tensor = next(one for one in proto.graph.initializer if one.name == name)
    value = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((value * np.float32(1.03)).astype(value.dtype), name))
    onnx.save(proto, other)


def test_a_file_says_what_its_images_and_classes_are(files: Any) -> None:
    model, path = files("uniform")
    again = OnnxClassifier(path)
    assert again.card.recipe == json.loads(json.dumps(model.card.recipe))  # type: ignore[union-attr]
    assert again.card.preprocessing == model.card.preprocessing  # type: ignore[union-attr]
    assert again.num_classes == 10 and again.costs["coverage_macs"] == 1.0
    for size in (1, 3):
        assert again(torch.randn(size, 1, 8, 8)).shape == (size, 10)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda proto: proto.metadata_props.clear(), "no lowbit-onnx/1 file"),
        (lambda proto: _says(proto, "card", {"model": 3}), "does not say what model"),
        (lambda proto: _says(proto, "card", [1]), "does not say what model"),
        (lambda proto: _says(proto, "costs", 7), "does not say what model"),
        (lambda proto: _says(proto, "grids", {"a": 7}), "damaged"),
    ],
)
def test_a_file_of_a_stranger_is_refused_in_one_line(
    change: Any, said: str, files: Any, tmp_path: Path
) -> None:
    proto = onnx.load(files("uniform")[1])
    change(proto)
    onnx.save(proto, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=said) as caught:
        OnnxClassifier(tmp_path / "other.onnx")
    assert "\n" not in str(caught.value)


def _says(proto: onnx.ModelProto, key: str, value: Any) -> None:
    for one in proto.metadata_props:
        if one.key == f"lowbit.{key}":
            one.value = json.dumps(value)


def test_a_damaged_or_missing_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no ONNX file"):
        OnnxModel(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\x08\xff not a model")
    with pytest.raises(ValueError, match="damaged, or no ONNX file"):
        OnnxModel(tmp_path / "bad.onnx")
    with pytest.raises(ValueError, match="is an ONNX file, which test and predict"):
        (tmp_path / "bad.onnx").touch()
        qat.load(tmp_path / "bad.onnx")


def test_a_model_that_is_not_calibrated_or_not_in_float32_is_refused(
    tmp_path: Path, images: Tensor
) -> None:
    model = make_tiny_vit(depth=1)
    qat.convert_(model, load_plan("w8a8"), Affine)
    with pytest.raises(ValueError, match="is not calibrated"):
        export_onnx(model, tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="float32"):
        export_onnx(make_tiny_vit(depth=1).bfloat16(), tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


def test_without_the_packages_one_line_says_what_to_install(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = files("uniform")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"onnxruntime is not installed; pip .*export"):
        OnnxModel(path)(np.zeros((1, 1, 8, 8), np.float32))


@torch.no_grad()
@pytest.mark.parametrize("grid", [LogSqrt2, partial(LogSqrt2, zero="none"), TanQ])
def test_a_table_gives_the_level_of_every_number(grid: Any) -> None:
    """Also of those right at the bounds, which the quantizer's own arithmetic decides."""
    from qat.export.stand_ins import Table

    quantizer = grid(qat.QuantSpec(4, signed=False), (1, 1, 1))
    quantizer.scale.fill_(0.37)
    table = Table(quantizer)
    on = table.bounds[table.bounds.isfinite()] * quantizer.scale
    x = torch.cat([on, on.nextafter(on.new_tensor(1)), on.nextafter(-on), torch.rand(999)])
    bounds = table.bounds[table.bounds.isfinite()]
    codes = torch.bucketize((x / table.scale).clamp(0, 1), bounds, right=True)
    assert torch.equal(
        table.levels[codes], quantizer.codes(x).table[quantizer.codes(x).values.int()]
    )

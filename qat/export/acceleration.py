"""Which products of an ONNX file run on integers, by what a runtime makes of its graph."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from qat.export.onnx_file import OnnxModel
from qat.export.runtimes import compiled_of, has_openvino, session_of
from qat.quantizers import Quantizer

PRODUCTS = ("MatMul", "Gemm", "Conv")
INTEGER = (
    *("QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul"),
    *("QGemm", "QLinearConv", "ConvInteger"),
)
"""Operators of ONNX Runtime that multiply integers."""


@dataclass(frozen=True)
class Product:
    """A product of a file.

    Attributes:
        node: Name of its node.
        kind: Operator, and widths of the operands.
        runtimes: For each runtime whether it multiplies integers.
    """

    node: str
    kind: str
    runtimes: Mapping[str, bool]


def products(model: nn.Module, path: str | Path) -> list[Product]:
    """The products of a file, and in which runtimes they run on integers.

    Args:
        model: The model that was exported.
        path: The file.
    """
    file = OnnxModel(path)
    nodes = [node for node in file.proto.graph.node if node.op_type in PRODUCTS]
    found = {name: look(file) for name, look in _looks().items()}
    return [
        Product(
            node.name,
            f"{node.op_type}, {_widths(model, node.name)}",
            {name: bool(fast & {node.name, *node.output}) for name, fast in found.items()},
        )
        for node in nodes
    ]


def table(found: list[Product]) -> Table:
    """How many products of each kind run on integers, by runtime."""
    made = Table(title="Products on integer kernels", title_justify="left")
    made.add_column("product")
    names = found[0].runtimes if found else {}
    for heading in ("in the file", *names):
        made.add_column(heading, justify="right")
    for kind in dict.fromkeys(product.kind for product in found):
        same = [product for product in found if product.kind == kind]
        counts = (str(sum(product.runtimes[name] for product in same)) for name in names)
        made.add_row(kind, str(len(same)), *counts)
    return made


def slow(found: list[Product]) -> Iterator[str]:
    """A sentence for each runtime in which products of integers are computed in float."""
    for name in found[0].runtimes if found else ():
        left = [product.node for product in found if not product.runtimes[name]]
        if left:
            yield (
                f"{name} computes {len(left)} of {len(found)} products in float, such as "
                f"{left[0]}; docs/onnx.md says why"
            )


def items(found: list[Product]) -> dict[str, Any]:
    """What `metrics.json` holds of it."""
    counts: dict[str, Any] = {"n_products": len(found)}
    for name in found[0].runtimes if found else ():
        key = f"n_products_int_{name.lower().replace(' ', '')}"
        counts[key] = sum(product.runtimes[name] for product in found)
    return counts


def _widths(model: nn.Module, node: str) -> str:
    """Bits of both operands, such as `8 x 8 bit`; those without a quantizer have 32."""
    path = node.partition("/")[0]
    parts = dict(model.named_modules())
    owner = parts.get(path)
    names = ("left_quantizer", "right_quantizer")
    if not any(hasattr(owner, name) for name in names):
        names = ("input_quantizer", "weight_quantizer")
    operands = (getattr(owner, name, None) for name in names)
    bits = [q.spec.bits if isinstance(q, Quantizer) else 32 for q in operands]
    return f"{bits[0]} x {bits[1]} bit"


def _looks() -> dict[str, Callable[[OnnxModel], set[str]]]:
    looks = {"ONNX Runtime": _in_onnx_runtime}
    return looks | ({"OpenVINO": _in_openvino} if has_openvino() else {})


def _in_onnx_runtime(file: OnnxModel) -> set[str]:
    """Names of nodes that ONNX Runtime has made integer operators of, and of their outputs."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session_of(file.content, optimized_model_filepath=str(path))
        nodes = onnx.load(path).graph.node
    fast = [node for node in nodes if node.op_type in INTEGER]
    return {name for node in fast for name in (node.name, *node.output)}


def _in_openvino(file: OnnxModel) -> set[str]:
    """Names of nodes that OpenVINO multiplies in 8 bits, and of their outputs."""
    found: set[str] = set()
    for node in compiled_of(file.content).get_runtime_model().get_ops():
        said = {key: str(item.value) for key, item in node.get_rt_info().items()}
        # A subgraph of several operators states the kernel of those that are not products.
        whole = said.get("layerType") == "Subgraph" or said.get("primitiveType", "").endswith("I8")
        if whole and said.get("runtimePrecision") in ("u8", "i8"):
            names = said.get("originalLayersNames", "").split(",")
            found |= {name.removesuffix("/WithoutBiases") for name in names}
    return found

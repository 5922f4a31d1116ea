"""The graph of an exported model, put in order: where its grids are, what its nodes are called."""

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir

from qat.export.operators import DOMAIN

Ends = dict[str, dict[str, str]]
"""For each grid the names of its values: `input`, which a weight has none of, and `output`."""


def ordered_(model: ir.Model) -> Ends:
    """Name nodes by their modules, keep narrow weights in 4 bits, and take the marks out.

    Returns:
        Where the grids are.
    """
    graph = model.graph
    _untransposed_(graph)
    _named_(graph)
    ends = _unmarked_(graph)
    _narrowed_(graph)
    for value in (*graph.initializers.values(), *graph.inputs, *graph.outputs):
        value.metadata_props.clear()
    model.opset_imports.pop(DOMAIN, None)
    model.producer_name, model.producer_version = "lowbit-vit", None
    return ends


def _untransposed_(graph: ir.Graph) -> None:
    """Take out pairs of transpositions that undo each other."""
    for node in graph:
        before = node.inputs[0].producer() if _is_transpose(node) and node.inputs[0] else None
        if before is not None and _is_transpose(before):
            first, second = (_order(one) for one in (before, node))
            if [first[i] for i in second] == sorted(first) and before.inputs[0] is not None:
                _replaced_(graph, node, before.inputs[0])
                if not before.outputs[0].uses():
                    graph.remove(before, safe=True)


def _is_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and "perm" in node.attributes


def _order(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints())


def _named_(graph: ir.Graph) -> None:
    """Name each node by the module that it comes from and its operator."""
    counts: Counter[str] = Counter()
    for node in graph:
        path = _module(node.metadata_props)
        name = "/".join(part for part in (path, node.op_type) if part)
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def _module(properties: Any) -> str:
    """The innermost module of the model that a node comes from."""
    scopes = properties.get("pkg.torch.onnx.name_scopes")
    names = _listed(scopes)[:-1] if scopes else []
    return names[-1].removesuffix(".grid").removesuffix(".quantizer") if names else ""


def _listed(text: str) -> list[str]:
    """Names from how the exporter writes them."""
    return [part.strip().strip("'\"") for part in text.strip("[]").split(",")]


def _unmarked_(graph: ir.Graph) -> Ends:
    ends: Ends = {}
    for node in graph:
        if node.domain != DOMAIN:
            continue
        assert node.inputs[0] is not None
        if node.op_type == "Mark":
            grid, side = (node.attributes[key].as_string() for key in ("grid", "side"))
            ends.setdefault(grid, {})[side] = str(node.inputs[0].name)
        _replaced_(graph, node, node.inputs[0])
    return ends


def _replaced_(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Take a node out, whose output is that value."""
    ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _narrowed_(graph: ir.Graph) -> None:
    """Keep integers that fit 4 bits in 4 bits, and widen them where they are read."""
    for node in list(graph):
        value = node.inputs[0] if node.op_type in ("DequantizeLinear", "Cast") else None
        wide = value.dtype if value is not None and value.name in graph.initializers else None
        if value is None or wide is None or value.const_value is None:
            continue
        codes = value.const_value.numpy()
        narrow = _four_bits(codes)
        if narrow is None:
            continue
        kept = ir.Tensor(codes.astype(narrow.numpy()), dtype=narrow, name=value.name)
        value.const_value, value.type = kept, ir.TensorType(narrow)
        if node.op_type == "DequantizeLinear":
            cast = ir.node("Cast", [value], {"to": int(wide)}, name=f"{node.name}/Cast")
            cast.outputs[0].name = f"{value.name}.wide"
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(wide), value.shape
            graph.insert_before(node, cast)
            node.replace_input_with(0, cast.outputs[0])


def _four_bits(codes: np.ndarray) -> ir.DataType | None:
    """The type of 4 bits that holds all codes."""
    if codes.dtype == np.uint8 and codes.max() <= 15:
        return ir.DataType.UINT4
    fits = codes.dtype == np.int8 and codes.min() >= -8 and codes.max() <= 7
    return ir.DataType.INT4 if fits else None

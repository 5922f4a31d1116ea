"""A model as an ONNX file, with standard operators only.

Quantizers become QuantizeLinear and DequantizeLinear where their grid has equal steps, and plain
arithmetic elsewhere (`qat.export.stand_ins`). The batch is of any size. The file says beside its
graph what images go in, what the classes are called, and where each grid is.
"""

import copy
import json
import warnings
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat import disk
from qat.card import card_of, expected_by
from qat.cost.count import cost
from qat.cost.coverage import cost_items, coverage_rows
from qat.export.operators import OPSET
from qat.export.pack import card_items, require_calibrated
from qat.export.stand_ins import replace_
from qat.export.watch import watched
from qat.extras import needs
from qat.models import example_inputs
from qat.spec import Operand

FORMAT = "lowbit-onnx/1"


def export_onnx(model: nn.Module, path: str | Path) -> None:
    """Write a model, which is calibrated if it is converted, as an ONNX file.

    Args:
        model: The model.
        path: The file.

    Raises:
        ValueError: If the model is not calibrated, computes in less than 32 bits, or does something
            that torch cannot export, or if packages are missing.
    """
    require_calibrated(model)
    if (dtype := card_of(model).dtype) is not torch.float32:
        raise ValueError(
            f"the model is in {dtype}, ONNX files are written in float32; convert it with "
            ".float() first"
        )
    with needs("export", "write ONNX files"):
        from qat.export.graph import ordered_
    inputs = tuple(torch.cat([x, x]) for x in example_inputs(model))
    program = _program(_with_stand_ins(model, inputs), inputs)
    _require_any_batch(program.model)
    ends = ordered_(program.model)
    counted = cost(model)
    costs = cost_items(counted) | {"coverage": coverage_rows(counted)}
    texts = {"format": FORMAT, "card": _card(model), "grids": ends, "costs": costs}
    for key, value in texts.items():
        program.model.metadata_props[f"lowbit.{key}"] = json.dumps(value)
    _write(program, path)


def _card(model: nn.Module) -> dict[str, Any]:
    """What the file says of the model; of one that no recipe builds, its images and classes."""
    card = card_of(model)
    if card.recipe is not None:
        return card_items(model)
    return {"preprocessing": expected_by(model).to_dict(), "class_names": card.class_names}


def _with_stand_ins(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """A copy of the model in whose quantizers' places are what is exported."""
    made = copy.deepcopy(model).eval()
    with torch.no_grad(), watched(made, lambda _, q: q.operand is Operand.WEIGHT) as weights:
        made(*inputs)
    with torch.no_grad():
        replace_(made, weights)
    return made


def _program(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """What torch exports.

    Raises:
        ValueError: If it cannot.
    """
    names = ["images", *(f"input_{i}" for i in range(1, len(inputs)))]
    try:
        with torch.no_grad(), needs("export", "write ONNX files"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                model,
                inputs,
                input_names=names,
                output_names=["logits"],
                opset_version=OPSET,
                dynamic_shapes=_shapes(model, len(inputs)),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error
        line = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise ValueError(
            f"torch cannot export this model to ONNX ({type(cause).__name__}: {line:.200})"
        ) from None


def _require_any_batch(graph: Any) -> None:
    """Refuse what torch has bound to the batch that it saw, without a word.

    Raises:
        ValueError: If an input has a batch of one size.
    """
    for value in graph.graph.inputs:
        if isinstance(size := value.shape[0], int):
            raise ValueError(
                f"torch can export this model for batches of {size} only: something in its forward "
                "pass turns their size into a number, as len(images) does; use images.shape[0]"
            )


def _shapes(model: nn.Module, count: int) -> tuple[Any, ...]:
    """Batches of any size, in the form of the arguments; an intercepted model takes `*args`."""
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in range(count))
    first = next(iter(signature(model.forward).parameters.values()))
    return (shapes,) if first.kind is Parameter.VAR_POSITIONAL else shapes


def _write(program: Any, path: str | Path) -> None:
    """Check and write, atomically."""
    with needs("export", "write ONNX files"):
        import onnx
    made = program.model_proto
    onnx.checker.check_model(made, full_check=True)
    disk.write(path, made.SerializeToString())

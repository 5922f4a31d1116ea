"""Measures and costs of a model, for `metrics.json`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from pytorch_lightning import Trainer
from torch import nn

from qat.card import card_of, untrained
from qat.cli.session import Session
from qat.cost.count import cost
from qat.cost.coverage import cost_items, coverage_rows, product_rows
from qat.export.classifier import OnnxClassifier
from qat.lightning.data import VisionData
from qat.patchwise import patchwise


def evaluate(
    session: Session, model: nn.Module, data: VisionData, evaluator: Trainer
) -> dict[str, Any]:
    """Measures of a model on the evaluation images, and its costs."""
    data.require_labels()
    data.follow(model)
    measured = session.task().evaluate(model, data, evaluator, session.folder.path)
    return measured | model_items(model)


def model_items(model: nn.Module) -> dict[str, Any]:
    """Costs of a model, in all and by product, names of its classes, what was never trained."""
    names, random = card_of(model).class_names, untrained(model)
    said = {"class_names": names and list(names), "untrained": random}
    kept = {key: value for key, value in said.items() if value}
    if isinstance(model, OnnxClassifier):
        return model.costs | kept
    costs = cost(model)
    tables = {"coverage": coverage_rows(costs), "products": product_rows(model, costs)}
    return cost_items(costs) | tables | kept


@contextmanager
def patchwise_as_asked(session: Session, model: nn.Module) -> Iterator[None]:
    """Patch-wise bits within the block, where the user asked for them."""
    bits = session.objects("patchwise").patchwise
    with nullcontext() if bits is None else patchwise(model, bits):
        yield

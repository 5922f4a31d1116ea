"""The card of a model: one value that says what the weights alone do not.

It stays with the model through copies, pickles and `to(...)`, and a checkpoint holds it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qat.plan import Plan
from qat.preprocessing import Preprocessing
from qat.quantizers import QuantizerFactory


@dataclass(frozen=True)
class Conversion:
    """What `qat.convert_` did, enough to do it again.

    Attributes:
        plan: The plan.
        make_quantizer: The factory.
        handlers: Type to handler.
        kept: For each layer and product left in float, by plan name, the reason.
    """

    plan: Plan
    make_quantizer: QuantizerFactory
    handlers: Mapping[type, Any]
    kept: Mapping[str, str]


@dataclass(frozen=True)
class Start:
    """Random weights that a model started from.

    Attributes:
        what: What of the model they are, for messages.
        parameter: Name of one of them.
        total: Its sum at the start; another one shows that it was trained or loaded since.
    """

    what: str
    parameter: str
    total: float


@dataclass(frozen=True)
class Card:
    """How a model is built, fed and converted.

    Attributes:
        recipe: How the float model is built, as plain data: arguments of `qat.timm_model`, or
            `class_path` and `init_args` of a builder; None where nobody said.
        preprocessing: What its images have gone through; None where that is not known.
        class_names: Names of its classes, in the order of its outputs.
        conversion: How it was converted; None for a float model.
        start: Random weights that it started from; None where they are no more.
        dtype: Type of its floating-point weights, as `card_of` finds them.
    """

    recipe: Mapping[str, Any] | None = None
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    conversion: Conversion | None = None
    start: Start | None = None
    dtype: torch.dtype = torch.float32


def card_of(model: nn.Module) -> Card:
    """The card of a model.

    Raises:
        ValueError: If it has none.
    """
    card = getattr(model, "card", None)
    if not isinstance(card, Card):
        raise ValueError(
            "the model has no card, which says how it is built and what its images are like; build "
            "it with qat.timm_model(name, ...), or give any model one with qat.adopt(model, ...)"
        )
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return replace(card, dtype=next(floating, card.dtype))


def amend(model: nn.Module, **fields: Any) -> None:
    """Set fields of the model's card; a model without a card gets one."""
    model.card = replace(getattr(model, "card", Card()), **fields)  # type: ignore[assignment]


def conversion_of(model: nn.Module) -> Conversion:
    """How the model was converted.

    Raises:
        ValueError: If it was not.
    """
    conversion = card_of(model).conversion
    if conversion is None:
        raise ValueError("the model is a float model; quantize it first, with qat.convert_")
    return conversion


def start_of(model: nn.Module, what: str, layer: str = "") -> Start:
    """The random weights of a model that was just built, by the last matrix of a layer."""
    matrices = [name for name, p in model.named_parameters() if p.ndim > 1]
    name = [name for name in matrices if name.startswith(layer)][-1]
    return Start(what, name, _total(model, name))


def untrained(model: nn.Module) -> str:
    """What of a model has the random weights of its start; empty if nothing has.

    Conversion and what follows it may change weights, so a converted model keeps the answer that it
    had, until it is trained.
    """
    card = card_of(model)
    start = card.start
    if start is None:
        return ""
    moved = card.conversion is None and _total(model, start.parameter) != start.total
    return "" if moved else start.what


def _total(model: nn.Module, name: str) -> float:
    """Sum of a parameter; NaN where it is gone, or has no values."""
    weight = dict(model.named_parameters()).get(name)
    if weight is None or weight.is_meta:
        return math.nan
    return float(weight.detach().double().sum())


def expected_by(model: nn.Module) -> Preprocessing:
    """The preprocessing that a model expects.

    Raises:
        ValueError: If its card does not say.
    """
    preprocessing = card_of(model).preprocessing
    if preprocessing is None:
        raise ValueError(
            "the model's card says nothing about its images; give it their size, mean and std with "
            "qat.adopt(model, preprocessing=...)"
        )
    return preprocessing

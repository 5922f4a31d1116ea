"""The switch `plain` / `react`: which blocks surround the binary operands.

`plain` is `qat.convert_` with `BinaryQuantizers`: the architecture of the float model, unchanged.
`react` is `react_` below: RPReLU and the extra shortcuts of `binaryvit.blocks`, around what the
plan puts on one bit; wider components, as in a searched plan, stay plain.
"""

from timm.layers.mlp import Mlp
from torch import nn

from binaryvit.blocks import ContextShortcut, ReactLinear, ReactMlp
from qat import Operand, Plan
from qat.convert import (
    HANDLERS,
    LAYER_OPERANDS,
    Conversion,
    Handler,
    Maker,
    convert_,
    quant_linear,
    quant_pair,
)
from qat.products import Pair
from qat.quantizers import QuantizerFactory


def react_linear(linear: nn.Linear, make: Maker) -> nn.Module:
    """Twin of a linear layer; the plain one where its weight is not binary."""
    if not _is_binary(make, Operand.WEIGHT):
        return quant_linear(linear, make)
    weight = make(Operand.WEIGHT, tuple(linear.weight.shape))
    assert weight is not None
    return ReactLinear(linear, weight, make(Operand.INPUT, (linear.in_features,)))


def react_pair(pair: Pair, make: Maker) -> tuple[nn.Module, ...]:
    """Products of an attention; with the shortcut around the context where values are binary."""
    products = quant_pair(pair, make)
    if not _is_binary(make, Operand.VALUE):
        return products
    return (*products, ContextShortcut(pair.vectors[-1]))


def react_mlp(mlp: Mlp, make: Maker) -> ReactMlp:
    """Twin of timm's MLP."""
    return ReactMlp(mlp)


def _is_binary(make: Maker, operand: Operand) -> bool:
    spec = make.rule.spec(operand)
    return spec is not None and spec.bits == 1


REACT_HANDLERS = {
    **HANDLERS,
    nn.Linear: Handler(react_linear, LAYER_OPERANDS),
    Pair: Handler(react_pair, HANDLERS[Pair].operands),
    Mlp: Handler(react_mlp, ()),
}


def react_(model: nn.Module, plan: Plan, make_quantizer: QuantizerFactory) -> Conversion:
    """`qat.convert_` with RPReLU and extra shortcuts around what the plan binarizes."""
    return convert_(model, plan, make_quantizer, REACT_HANDLERS)

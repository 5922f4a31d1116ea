"""Slots: the operands of a model that have bits, by the name of their module and their role."""

from typing import NamedTuple

from qat.quantizers.base import Quantizer
from qat.spec import Operand


class Slot(NamedTuple):
    """One operand of one module: what bits are given to.

    Attributes:
        module: Name of the module, as in a plan; attention products belong to their attention.
        operand: Which of its operands.
    """

    module: str
    operand: Operand

    def __str__(self) -> str:
        return f"{self.module}:{self.operand}"


PRODUCTS = {".qk": (Operand.QUERY, Operand.KEY), ".av": (Operand.ATTENTION, Operand.VALUE)}
"""Left and right operand of the products of an attention, by the ending of the product's name."""


def product_of(slot: Slot) -> str:
    """Name of the product that a slot is an operand of: a layer, or `<attention>.qk` or `.av`."""
    endings = (ending for ending, operands in PRODUCTS.items() if slot.operand in operands)
    return slot.module + next(endings, "")


def slots_of(product: str) -> tuple[Slot, Slot]:
    """The left and the right operand of a product, by its name."""
    for ending, (left, right) in PRODUCTS.items():
        if product.endswith(ending):
            owner = product.removesuffix(ending)
            return Slot(owner, left), Slot(owner, right)
    return Slot(product, Operand.INPUT), Slot(product, Operand.WEIGHT)


def slot_of(path: str, quantizer: Quantizer) -> Slot:
    """The slot of a quantizer at a path such as `blocks.0.attn.qk.left_quantizer`."""
    owner = path.rpartition(".")[0]
    return Slot(owner.removesuffix(".qk").removesuffix(".av"), quantizer.operand)

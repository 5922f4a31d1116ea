"""Slots: the operands of a model that have bits, by the name of their module and their role."""

import re
from typing import NamedTuple

from qat.quantizers.base import Quantizer
from qat.spec import Operand


class Slot(NamedTuple):
    """One operand of one module: what bits are given to.

    Attributes:
        module: Name of the module, as in a plan; products belong to the module that runs them, with
            `#1`, `#2` ... behind its name where it runs several.
        operand: Which of its operands.
    """

    module: str
    operand: Operand

    def __str__(self) -> str:
        return f"{self.module}:{self.operand}"


PRODUCTS = {
    "qk": (Operand.QUERY, Operand.KEY),
    "av": (Operand.ATTENTION, Operand.VALUE),
    "product": (Operand.LEFT, Operand.RIGHT),
}
"""Left and right operand of products, by the last part of the product's name."""
CHILD = re.compile(r"(?:(.*)\.)?(?:quant_)?(qk|av|product)(?:_(\d+))?")
"""Path of the child of a module that multiplies: its owner, which product it is, of which group."""


def product_of(slot: Slot) -> str:
    """Name of the product that a slot is an operand of: a layer, or `<module>.qk` and so on."""
    endings = (name for name, operands in PRODUCTS.items() if slot.operand in operands)
    return ".".join([slot.module, *endings])


def slots_of(product: str) -> tuple[Slot, Slot]:
    """The left and the right operand of a product, by its name."""
    owner, _, name = product.rpartition(".")
    if name in PRODUCTS:
        left, right = PRODUCTS[name]
        return Slot(owner, left), Slot(owner, right)
    return Slot(product, Operand.INPUT), Slot(product, Operand.WEIGHT)


def slot_of(path: str, quantizer: Quantizer) -> Slot:
    """The slot of a quantizer at a path such as `blocks.0.attn.qk.left_quantizer`."""
    owner = path.rpartition(".")[0]
    if quantizer.operand in (Operand.WEIGHT, Operand.INPUT):
        return Slot(owner, quantizer.operand)
    return Slot(owner_of(owner), quantizer.operand)


def owner_of(child: str) -> str:
    """Plan name of what runs a product, by the path of the child that multiplies."""
    found = CHILD.fullmatch(child)
    if found is None:
        return child
    owner, _, number = found.groups()
    return f"{owner or ''}#{number}" if number else owner or ""

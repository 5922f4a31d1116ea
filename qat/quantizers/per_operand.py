"""A factory that gives attention maps another quantizer than all other operands."""

from dataclasses import dataclass

from qat.quantizers.affine import Affine
from qat.quantizers.base import Factory, Quantizer, QuantizerFactory
from qat.spec import Operand, QuantSpec


@dataclass(frozen=True)
class PerOperand(Factory):
    """Builds the quantizers of a model whose attention maps need a grid of their own.

    Attributes:
        attention: Factory for the softmax output, such as `LogSqrt2`.
        default: Factory for every other operand.
    """

    attention: Factory | QuantizerFactory
    default: Factory | QuantizerFactory = Affine

    def __call__(self, spec: QuantSpec, shape: tuple[int, ...], operand: Operand) -> Quantizer:
        """The quantizer of one operand."""
        factory = self.attention if operand is Operand.ATTENTION else self.default
        return factory(spec, shape, operand)

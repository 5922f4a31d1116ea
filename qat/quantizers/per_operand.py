"""A factory that gives some operands another quantizer than all others."""

from dataclasses import dataclass

from qat.quantizers.affine import Affine
from qat.quantizers.base import Factory, Quantizer, QuantizerFactory
from qat.spec import Operand, QuantSpec


@dataclass(frozen=True)
class PerOperand(Factory):
    """Builds the quantizers of a model some of whose operands need a grid of their own.

    Attributes:
        attention: Factory for the softmax output, such as `LogSqrt2`; None takes the default.
        default: Factory for every other operand.
        weight: Factory for weights, such as `TwinLog`; None takes the default.
        input: Factory for the inputs of layers, such as `DynamicToken`; None takes the default.
    """

    attention: Factory | QuantizerFactory | None = None
    default: Factory | QuantizerFactory = Affine
    weight: Factory | QuantizerFactory | None = None
    input: Factory | QuantizerFactory | None = None

    def __call__(self, spec: QuantSpec, shape: tuple[int, ...], operand: Operand) -> Quantizer:
        """The quantizer of one operand."""
        own = {
            Operand.ATTENTION: self.attention,
            Operand.WEIGHT: self.weight,
            Operand.INPUT: self.input,
        }
        return (own.get(operand) or self.default)(spec, shape, operand)

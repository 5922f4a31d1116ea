"""What is done to the input of a layer before it is quantized: rotations, scalings."""

from qat.transforms.linear import Dual, Hadamard, Scaling, Transform, Transforms

__all__ = ["Dual", "Hadamard", "Scaling", "Transform", "Transforms"]

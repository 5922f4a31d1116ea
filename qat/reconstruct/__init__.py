"""Block reconstruction: one loop, with pluggable losses and trainable sets."""

from qat.reconstruct.joint import JointTuning
from qat.reconstruct.loop import Reconstruction, activation_bytes, start_and_reconstruct
from qat.reconstruct.tuning import Tuning

__all__ = ["JointTuning", "Reconstruction", "Tuning", "activation_bytes", "start_and_reconstruct"]

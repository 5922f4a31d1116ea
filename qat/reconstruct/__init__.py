"""Block reconstruction: one loop, with pluggable losses and trainable sets."""

from qat.reconstruct.loop import Reconstruction, activation_bytes, start_and_reconstruct

__all__ = ["Reconstruction", "activation_bytes", "start_and_reconstruct"]

"""BinaryViT of Xiao, Li, Yang and Gu (arXiv 2305.14730): ViTs with binary weights and activations.

Not the paper of the same name by Le and Li (CVPRW 2023), which changes the architecture. Only the
abstracts of Xiao et al. were available: everything beyond them is a *reconstruction*, with the
candidates side by side, and says so where it stands.
"""

from binaryvit.quantizers import BinaryQuantizers

__all__ = ["BinaryQuantizers"]

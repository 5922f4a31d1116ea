"""Tent: fully test-time adaptation by entropy minimization.

Wang, Shelhamer, Liu, Olshausen, Darrell. ICLR 2021. https://arxiv.org/abs/2006.10726

    loss     mean over the batch of H(softmax(z))
    trained  weights and biases of normalization layers; batch normalization uses batch statistics
    answer   the logits before the step

Settings: SGD 0.001 / 64 x batch with momentum 0.9 for ViTs (as SAR and FOA run it); Adam 1e-3 at
batch 200 for CIFAR-10, SGD 2.5e-4 at batch 64 for ImageNet ResNets.
Deviations: LayerNorm and GroupNorm are trained too (the official code collects BatchNorm2d only, on
a ViT nothing). Provenance: the authors' code, commit e9e926a.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.tta.answer import State, Step
from qat.tta.gradient import GradientMethod, gradient
from qat.tta.overlay import Overlay
from qat.tta.parts import part


@dataclass(frozen=True)
class Tent(GradientMethod):
    """Descends the entropy of its predictions."""

    def step(self, on: Overlay, state: State, images: Tensor, generator: torch.Generator) -> Step:
        """One step over the whole batch."""
        params, logits, state, answer = self.forward(on, state, images)
        balance = part(state, "balance")
        grad = gradient(lambda: self.balance.alone(balance, logits).mean(), params)
        n = len(images)
        return Step(answer, self.descend(state, grad), n, num_forward=n, num_backward=n)

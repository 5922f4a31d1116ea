"""CoTTA: continual test-time domain adaptation.

Wang, Fink, Van Gool, Dai. CVPR 2022. https://arxiv.org/abs/2203.13591

    teacher   t <- 0.999 t + 0.001 s after every step
    target    softmax of the teacher's logits; where the original model's mean confidence on the
              batch is below `threshold`, of their mean over `views` random views of the images
    loss      cross-entropy of the student with the target
    restore   after every step each parameter of the student returns to its start with
              probability `restore`
    answer    the logits that the target came from

Settings: CIFAR-10 threshold 0.92, restore 0.01, Adam 1e-3, 32 views; ImageNet 0.1, 0.001, SGD 0.01.
Deviations: only normalization is trained unless `adapts_all` is set, as in the paper (then weights
move straight through their rounding); the symmetric loss of the ImageNet version is not offered.
Provenance: the authors' code, commit c212a20, whose settings differ from its defaults.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat.card import expected_by
from qat.quantizers import quantizers
from qat.tta.answer import State, Step
from qat.tta.augment import view
from qat.tta.gradient import GradientMethod, gradient
from qat.tta.ops import moved
from qat.tta.overlay import Overlay
from qat.tta.parts import part, with_part


@dataclass(frozen=True)
class CoTTA(GradientMethod):
    """A student follows its own average.

    Attributes:
        views: Random views that an uncertain target is the mean of.
        threshold: Mean confidence of the original model below which the target is uncertain.
        follow: Share of the student in the teacher after each step.
        restore: Probability that a parameter returns to its start.
        adapts_all: Train every parameter that belongs to no quantizer, not normalization alone.
    """

    views: int = 32
    threshold: float = 0.92
    follow: float = 0.001
    restore: float = 0.01
    adapts_all: bool = False

    def parameters(self, model: nn.Module) -> list[str]:
        """Those of normalization, or all but the quantizers'."""
        if not self.adapts_all:
            return super().parameters(model)
        owned = {id(p) for _, quantizer in quantizers(model) for p in quantizer.parameters()}
        return [name for name, p in model.named_parameters() if id(p) not in owned]

    def start(self, on: Overlay, calibration: Iterable[Tensor]) -> State:
        """Teacher and student are the model."""
        state = super().start(on, calibration)
        return {**state, "teacher": state["params"], "anchor": state["params"]}

    def predict(self, on: Overlay, state: State, images: Tensor) -> Float[Tensor, "n c"]:
        """Logits of the teacher."""
        return super().predict(on, {**state, "params": state["teacher"]}, images)

    def step(self, on: Overlay, state: State, images: Tensor, generator: torch.Generator) -> Step:
        """One step of the student, then of the teacher."""
        hooks = self.hooks(on, images)
        with torch.no_grad():
            confidence = on(state["anchor"], images, hooks).softmax(1).amax(1).mean()
            views = [images]
            if confidence < self.threshold:
                preprocessing = expected_by(on.model)
                views = [view(images, preprocessing, generator) for _ in range(self.views)]
            answers = [on(state["teacher"], rows, hooks) for rows in views]
            teacher = torch.stack(answers).mean(0)
        params, logits, _, _ = self.forward(on, state, images)
        balance = self.balance.update(part(state, "balance"), teacher)
        target = teacher.softmax(1)
        grad = gradient(lambda: self.balance.against(balance, logits, target).mean(), params)
        state = self.descend(with_part(state, "balance", balance), grad)
        student = state["params"]
        followed = moved(state["teacher"], student, self.follow)
        draw = torch.rand(student.shape, generator=generator, device=student.device)
        student = torch.where(draw < self.restore, state["anchor"], student)
        n = len(images)
        answer = self.balance.answer(balance, teacher)
        state = {**state, "params": student, "teacher": followed}
        return Step(answer, state, n, num_forward=(2 + len(views)) * n, num_backward=n)

"""RoTTA: robust test-time adaptation in dynamic scenarios.

Yuan, Xie, Li. CVPR 2023. https://arxiv.org/abs/2303.13899

    memory   `capacity` images, at most capacity / C of each predicted class;
             score = 1 / (1 + exp(-age / capacity)) + H / ln C; a new image (age 0) enters under its
             class's quota, when full in place of the highest score of the largest classes, else in
             place of the highest of its own class, if that exceeds its own score
    step     after every `capacity` images: teacher on the memory, student on random views of it,
             cross-entropy weighted by exp(-a) / (1 + exp(-a)), a = age / capacity
    teacher  t <- 0.999 t + 0.001 s; answers
    norm     batch normalization by running statistics that move by 0.05 towards the memory's

Settings: Adam 1e-3. Deviations: LayerNorm and GroupNorm are trained too; teacher and student share
the running statistics. Provenance: the authors' code, commit 67e34c9.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import log

import torch
from jaxtyping import Float
from torch import Tensor

from qat.card import expected_by
from qat.models import num_classes_of
from qat.tta.answer import State, Step
from qat.tta.augment import view
from qat.tta.gradient import GradientMethod, gradient
from qat.tta.memory import Memory
from qat.tta.norms import BatchStatistics, batch_norms
from qat.tta.ops import entropy, moved
from qat.tta.optim import Adam, Optimizer
from qat.tta.overlay import Hooks, Overlay
from qat.tta.parts import part, with_part


@dataclass(frozen=True)
class RoTTA(GradientMethod):
    """Learns from a memory that is balanced over classes and time.

    Attributes:
        capacity: Images in the memory, and between two steps.
        follow: Share of the student in the teacher after each step.
        statistics: Share of the memory in the running statistics of batch normalization.
    """

    optimizer: Optimizer = Adam()  # noqa: RUF009 - a frozen value
    capacity: int = 64
    follow: float = 0.001
    statistics: float = 0.05

    def start(self, on: Overlay, calibration: Iterable[Tensor]) -> State:
        """Teacher and student are the model, the memory is empty."""
        state = super().start(on, calibration)
        state = {**state, "teacher": state["params"], "added": torch.zeros((), dtype=torch.int64)}
        memory = Memory.empty(self.capacity, expected_by(on.model).input_size, on.like)
        state = with_part(state, "memory", memory.tensors())
        for name, layer in batch_norms(on.model).items():
            assert layer.running_mean is not None and layer.running_var is not None
            running = {"mean": layer.running_mean.clone(), "variance": layer.running_var.clone()}
            state = with_part(state, f"norm:{name}", running)
        return state

    def predict(self, on: Overlay, state: State, images: Tensor) -> Float[Tensor, "n c"]:
        """Logits of the teacher."""
        logits = on(state["teacher"], images, self._running(on, state, 0.0))
        return self.balance.answer(part(state, "balance"), logits)

    def _running(self, on: Overlay, state: State, share: float, seen: dict | None = None) -> Hooks:
        names = list(batch_norms(on.model))
        means = {name: state[f"norm:{name}.mean"] for name in names}
        variances = {name: state[f"norm:{name}.variance"] for name in names}
        return BatchStatistics(share, means, variances, seen)

    def step(self, on: Overlay, state: State, images: Tensor, generator: torch.Generator) -> Step:
        """Put every image into the memory; learn from it when enough have come."""
        with torch.no_grad():
            logits = on(state["teacher"], images, self._running(on, state, 0.0))
        balance = self.balance.update(part(state, "balance"), logits)
        answer = self.balance.answer(balance, logits)
        state = with_part(state, "balance", balance)
        memory = Memory(**part(state, "memory"), num_classes=num_classes_of(on.model)).copy()
        scores = entropy(logits) / log(logits.shape[1])
        added, forward, backward = int(state["added"]), len(images), 0
        for image, label, score in zip(images, logits.argmax(1), scores, strict=True):
            memory.add(image, int(label), float(score))
            added += 1
            if added % self.capacity == 0:
                state = self._learn(on, state, memory, generator)
                forward += 2 * len(memory)
                backward += len(memory)
        state = with_part(state, "memory", memory.tensors())
        state = {**state, "added": torch.tensor(added)}
        return Step(answer, state, backward, forward, backward)

    def _learn(
        self, on: Overlay, state: State, memory: "Memory", generator: torch.Generator
    ) -> State:
        images, ages = memory.content()
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.no_grad():
            hooks = self._running(on, state, self.statistics)
            target = on(state["teacher"], images, hooks).softmax(1)
        params = state["params"].detach().requires_grad_()
        views = view(images, expected_by(on.model), generator)
        with torch.enable_grad():
            logits = on(params, views, self._running(on, state, self.statistics, seen))
        weights = torch.sigmoid(-ages / self.capacity)
        balance = part(state, "balance")
        losses = self.balance.against(balance, logits, target)
        state = self.descend(state, gradient(lambda: (weights * losses).mean(), params))
        for name, (mean, variance) in seen.items():
            state = with_part(state, f"norm:{name}", {"mean": mean, "variance": variance})
        return {**state, "teacher": moved(state["teacher"], state["params"], self.follow)}

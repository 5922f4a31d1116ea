"""Distillation: hard labels, soft labels at a temperature, and optional feature terms.

    hard      cross-entropy of the student with the labels
    soft      T^2 * KL(softmax(z_teacher / T) || softmax(z_student / T)), mean over images
              Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531
    feature   mean over layers and tokens of |f_s/|f_s| - f_t/|f_t||^2, both normalized per token

The loss is their weighted sum. At T = 1 the soft term differs from the soft-label cross-entropy by
the teacher's entropy, a constant.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Features = Mapping[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """Weights of the terms of the loss.

    Attributes:
        hard: Weight of the cross-entropy with the labels.
        soft: Weight of the divergence from the teacher's distribution.
        temperature: Divides the logits of the soft term.
        label_smoothing: Of the hard labels.
        feature: Weight of the feature term.
        feature_layers: `fnmatch` pattern of the modules whose outputs the feature term compares;
            it matches names with as many dots as it has itself.

    Raises:
        ValueError: If the temperature is not positive, the smoothing is out of range, or weights
            are negative or all zero.
    """

    hard: float = 1.0
    soft: float = 0.0
    temperature: float = 1.0
    label_smoothing: float = 0.0
    feature: float = 0.0
    feature_layers: str = "blocks.*"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"objective.temperature must be positive, got {self.temperature}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"objective.label_smoothing must be in [0, 1), got {self.label_smoothing}"
            )
        weights = (self.hard, self.soft, self.feature)
        if min(weights) < 0 or not any(weights):
            raise ValueError(
                f"objective weights must not be negative and not all zero, got {weights}"
            )

    @property
    def needs_teacher(self) -> bool:
        """True if a term compares with a teacher."""
        return self.soft > 0 or self.feature > 0

    def terms(
        self,
        logits: Float[Tensor, "batch classes"],
        labels: Int[Tensor, " batch"],
        teacher_logits: Float[Tensor, "batch classes"] | None = None,
        features: tuple[Features, Features] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Terms with a weight, by name, unweighted, and their weighted sum as `loss`.

        Args:
            logits: Of the student.
            labels: Class indices.
            teacher_logits: Of the teacher; None without one.
            features: Outputs of the compared layers, of student and teacher; None without them.
        """
        terms = {}
        if self.hard:
            terms["hard"] = F.cross_entropy(
                logits.float(), labels, label_smoothing=self.label_smoothing
            )
        if self.soft and teacher_logits is not None:
            terms["soft"] = soft_label_loss(logits, teacher_logits, self.temperature)
        if self.feature and features is not None:
            terms["feature"] = feature_loss(*features)
        terms["loss"] = torch.stack([getattr(self, k) * v for k, v in terms.items()]).sum()
        return terms


def soft_label_loss(
    logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: float,
) -> Float[Tensor, ""]:
    """`T^2 * KL(teacher || student)` at temperature T, mean over the batch."""
    student = F.log_softmax(logits.float() / temperature, -1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, -1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def feature_loss(student: Features, teacher: Features) -> Float[Tensor, ""]:
    """Mean squared distance of token features at unit norm, over layers, images and tokens."""
    distances = [
        (F.normalize(student[name].float(), dim=-1) - F.normalize(teacher[name].float(), dim=-1))
        .square()
        .sum(-1)
        .mean()
        for name in student
    ]
    return torch.stack(distances).mean()


class FeatureTap:
    """Collects the outputs of the modules that a pattern matches.

    Args:
        model: The model.
        pattern: `fnmatch` pattern of module names.

    Raises:
        ValueError: If it matches nothing.
    """

    def __init__(self, model: nn.Module, pattern: str) -> None:
        self.features: dict[str, Tensor] = {}
        depth = pattern.count(".")
        names = [
            name
            for name, _ in model.named_modules()
            if name.count(".") == depth and fnmatch.fnmatchcase(name, pattern)
        ]
        if not names:
            raise ValueError(f"objective.feature_layers '{pattern}' matches no module")
        self.handles = [
            model.get_submodule(name).register_forward_hook(partial(self._keep, name))
            for name in names
        ]

    def remove(self) -> None:
        """Stop to collect."""
        for handle in self.handles:
            handle.remove()

    def _keep(self, name: str, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        self.features[name] = output

"""Training of classifiers: teachers, quantization-aware training and binarization."""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from qat import checkpoint as files
from qat.calibrate import calibrate
from qat.card import amend, card_of, expected_by
from qat.convert import convert_
from qat.data.samples import LabelledBatch
from qat.lightning.answers import hits, logits_of
from qat.lightning.training import Convert, Initialise, MakeOptimizer, MakeSchedule, Training
from qat.models import num_classes_of
from qat.quantizers import LSQ, Factory, QuantizerFactory
from qat.train.losses import FeatureTap, Objective
from qat.train.regularize import Regularizer


class Distillation(Training):
    """Trains a model on labels, on a teacher, or on both; quantized where there is a plan.

    Args:
        model: The model to train; None starts from a copy of the teacher.
        teacher: Checkpoint of a trained model; None trains on labels alone.
        plan: Bit-width plan, a file or a list of rules; None trains in float.
        quantizer: Builds the quantizer of each operand of the plan.
        convert: Puts the quantizers in place.
        initialise: Sets the quantizers' starting state from calibration batches.
        objective: Terms of the loss.
        optimizer: Called with parameter groups.
        lr_scheduler: Called with the optimizer and the number of its steps, stepped after each;
            None keeps the learning rate.
        regularizer: Acts on latent weights beside the loss, such as `binaryvit.grs.GRS`.
        compile: Whether `torch.compile` speeds up the model, and its teacher, while it trains.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        teacher: str | None = None,
        plan: str | list[dict[str, Any]] | None = None,
        quantizer: Factory | QuantizerFactory = LSQ,
        convert: Convert = convert_,
        initialise: Initialise = calibrate,
        objective: Objective = Objective(),  # noqa: B008 - a frozen value
        optimizer: MakeOptimizer = torch.optim.AdamW,
        lr_scheduler: MakeSchedule | None = None,
        regularizer: Regularizer | None = None,
        compile: bool = False,
    ) -> None:
        teacher_model = None if teacher is None else files.load(teacher)
        if objective.needs_teacher and teacher_model is None:
            raise ValueError(
                "the objective has a soft or feature term but there is no teacher; set "
                "model.teacher to a checkpoint, or teacher_config to a recipe that trains one"
            )
        super().__init__(
            model,
            teacher,
            plan,
            quantizer,
            convert,
            initialise,
            optimizer,
            lr_scheduler,
            regularizer,
            compile,
        )
        self.objective = objective
        # In a list, so that the teacher is no part of this module's parameters and checkpoints.
        self._teacher = [] if teacher_model is None else [teacher_model.requires_grad_(False)]
        if teacher_model is not None:
            _require_same_task(self.model, teacher_model)
        self._taps: list[FeatureTap] = []
        self.top1 = MeanMetric()
        self.top5 = MeanMetric() if num_classes_of(self.model) > 5 else None
        # Others leave NaN out; this one leaves weights out, so it is given each image's loss.
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.num_images, self.num_refused = SumMetric(), SumMetric()

    @property
    def measures(self) -> tuple[str, ...]:
        """Terms of the loss, accuracy and cross-entropy."""
        terms = [term for term in ("hard", "soft", "feature") if getattr(self.objective, term)]
        top5 = ("val/top5",) * (self.top5 is not None)
        train = (f"train/{term}" for term in (*terms, "loss"))
        return (*train, "val/n_images", "val/n_refused", "val/top1", "val/loss", *top5)

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher, if there is one."""
        return self._teacher[0] if self._teacher else None

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the model."""
        return self.model(images)

    def on_fit_start(self) -> None:
        """Make the teacher ready."""
        if self.teacher is not None:
            self.teacher.to(self.device)
            if self.objective.feature:
                layers = self.objective.feature_layers
                self._taps = [FeatureTap(m, layers) for m in (self.model, self.teacher)]
        super().on_fit_start()

    def configure_callbacks(self) -> list[Callback]:
        """What calls `on_fit_end` where training fails."""
        return [_Untap()]

    def on_fit_end(self) -> None:
        """Leave the compared layers alone again."""
        for tap in self._taps:
            tap.remove()
        self._taps = []

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        images, labels = batch
        logits = self.model(images)
        teacher_logits = None
        if self.teacher is not None and self.objective.needs_teacher:
            with torch.no_grad():
                teacher_logits = self.teacher(images)
        features = (self._taps[0].features, self._taps[1].features) if self._taps else None
        terms = self.objective.terms(logits, labels, teacher_logits, features)
        self.log_dict({f"train/{k}": v for k, v in terms.items()}, prog_bar=True)
        return terms["loss"]

    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        """Accuracy of one batch, a refused image counting as wrong, and cross-entropy."""
        images, labels, faults = LabelledBatch(*batch)
        logits = logits_of(self.model, images)
        self.top1(hits(logits, labels, 1, len(faults)))
        if len(labels):
            self.val_loss(nn.functional.cross_entropy(logits, labels, reduction="none"))
        self.num_images(len(labels) + len(faults))
        self.num_refused(len(faults))
        self.log("val/n_images", self.num_images)
        self.log("val/n_refused", self.num_refused)
        self.log("val/top1", self.top1, prog_bar=True)
        self.log("val/loss", self.val_loss)
        if self.top5 is not None:
            self.top5(hits(logits, labels, 5, len(faults)))
            self.log("val/top5", self.top5)


class _Untap(Callback):
    """Leaves compared layers alone where training fails."""

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        pl_module.on_fit_end()


def _require_same_task(model: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher of other classes or images; a model without class names gets its names."""
    if card_of(model).class_names is None:
        amend(model, class_names=card_of(teacher).class_names)
    for what, of in (
        ("num_classes", num_classes_of),
        ("preprocessing", expected_by),
        ("class names", lambda model: card_of(model).class_names),
    ):
        ours, theirs = of(model), of(teacher)
        if ours != theirs:
            raise ValueError(
                f"model and teacher disagree on {what}: {ours} against {theirs}; both see the same "
                "images, so build the model with the teacher's settings"
            )

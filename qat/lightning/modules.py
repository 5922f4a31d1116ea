"""One module for teacher training, quantization-aware training and binarization."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from qat import checkpoint as files
from qat.calibrate import calibrate
from qat.convert import Conversion, convert_
from qat.journal import Journal
from qat.losses import FeatureTap, Objective
from qat.models import num_classes_of
from qat.plan import Plan, load_plan
from qat.quantizers import LSQ, Factory, Phase, QuantizerFactory, quantizers
from qat.regularize import Regularizer

MakeOptimizer = Callable[[Iterable], Optimizer]
MakeSchedule = Callable[[Optimizer, int], LRScheduler]
Convert = Callable[[nn.Module, Plan, QuantizerFactory], Conversion]
Initialise = Callable[[nn.Module, Iterable[Tensor], Journal], None]
"""A `qat.calibrate.Initialiser`, in the form that the parser of arguments understands."""


class Distillation(LightningModule):
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
    ) -> None:
        super().__init__()
        teacher_model = None if teacher is None else files.load(teacher)
        if objective.needs_teacher and teacher_model is None:
            raise ValueError(
                "the objective has a soft or feature term but there is no teacher; set "
                "model.teacher to a checkpoint, or teacher_config to a recipe that trains one"
            )
        if model is None:
            if teacher is None:
                raise ValueError("set model.model, or model.teacher to start from its copy")
            model = files.load(teacher)
        if plan is not None:
            convert(model, load_plan(plan), quantizer)
        self.model = model
        self.initialise = initialise
        self.journal: Journal = Journal()
        self.objective = objective
        self.make_optimizer, self.make_schedule = optimizer, lr_scheduler
        self.regularizer = regularizer
        # In a list, so that the teacher is no part of this module's parameters and checkpoints.
        self._teacher = [] if teacher_model is None else [teacher_model.requires_grad_(False)]
        if teacher_model is not None:
            _require_same_task(model, teacher_model)
        self._taps: list[FeatureTap] = []
        num_classes = num_classes_of(model)
        self.top1 = MulticlassAccuracy(num_classes, average="micro")
        self.top5 = (
            MulticlassAccuracy(num_classes, average="micro", top_k=5) if num_classes > 5 else None
        )
        self.val_loss, self.num_images = MeanMetric(), SumMetric()
        self._rng_state: Tensor | None = None

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher, if there is one."""
        return self._teacher[0] if self._teacher else None

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the model."""
        return self.model(images)

    def on_fit_start(self) -> None:
        """Initialise quantizers that are still in float; a resumed run has them already."""
        if self.teacher is not None:
            self.teacher.to(self.device)
            if self.objective.feature:
                layers = self.objective.feature_layers
                self._taps = [FeatureTap(m, layers) for m in (self.model, self.teacher)]
        fresh = [q for _, q in quantizers(self.model) if q.phase is Phase.FLOAT]
        if fresh:
            batches = self.trainer.datamodule.calibration_batches()  # type: ignore[attr-defined]
            self.initialise(
                self.model, (images.to(self.device) for images in batches), self.journal
            )
        self.model.train()  # Lightning keeps the mode it finds, and a loaded model is in eval

    def on_train_start(self) -> None:
        """Continue the random numbers of the run that is resumed."""
        if self._rng_state is not None:
            torch.set_rng_state(self._rng_state)
            self._rng_state = None

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

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Accuracy and cross-entropy of one batch."""
        images, labels = batch
        logits = self.model(images).float()
        self.top1(logits, labels)
        self.val_loss(nn.functional.cross_entropy(logits, labels), len(labels))
        self.num_images(len(labels))
        self.log("val/n_images", self.num_images)
        self.log("val/top1", self.top1, prog_bar=True)
        self.log("val/loss", self.val_loss)
        if self.top5 is not None:
            self.top5(logits, labels)
            self.log("val/top5", self.top5)

    test_step = validation_step

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let the regularizer act on gradients."""
        if self.regularizer is not None:
            self.regularizer.adjust_gradients(self.model, self._progress())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the regularizer act on weights."""
        super().optimizer_step(*args, **kwargs)
        if self.regularizer is not None:
            lr = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.regularizer.adjust_weights(self.model, lr, self._progress())

    def configure_optimizers(self) -> Any:
        """Optimizer over two groups, the second without weight decay, and the schedule."""
        optimizer = self.make_optimizer(parameter_groups(self.model))
        if self.make_schedule is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = {"scheduler": self.make_schedule(optimizer, steps), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the model without this module, and the random state."""
        state = checkpoint["state_dict"]
        # A weight-averaging callback brings the state of a copy made before calibration; phases
        # are no weights to average.
        phases = {k: v for k, v in self.state_dict().items() if k.endswith("_extra_state")}
        state.update(phases)
        checkpoint[files.MANIFEST] = files.manifest(self.model, state, prefix="model.")
        if self.teacher is not None:
            checkpoint[files.MANIFEST]["teacher_sha256"] = files.digest(self.teacher.state_dict())
        checkpoint["rng_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model.

        Raises:
            ValueError: If it describes another model, plan or factory than the recipe does.
        """
        theirs = checkpoint.get(files.MANIFEST, {})
        files.require_same(theirs, files.manifest(self.model, self.state_dict(), "model."))
        self._rng_state = checkpoint["rng_state"]

    def _progress(self) -> float:
        return min(1.0, self.global_step / max(1, self.trainer.estimated_stepping_batches))


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters that decay, and those that never do.

    Scales and all other quantizer state, biases, normalization, and what timm's
    `no_weight_decay` names, such as position embeddings, are in the second group.
    """
    exempt = getattr(model, "no_weight_decay", lambda: ())()
    owned = {id(p) for _, quantizer in quantizers(model) for p in quantizer.parameters()}
    decays: list[nn.Parameter] = []
    stays: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        keeps = parameter.ndim < 2 or name in exempt or id(parameter) in owned
        if parameter.requires_grad:
            (stays if keeps else decays).append(parameter)
    return [{"params": decays}, {"params": stays, "weight_decay": 0.0}]


def _require_same_task(model: nn.Module, teacher: nn.Module) -> None:
    for what in ("num_classes", "preprocessing"):
        ours, theirs = getattr(model, what), getattr(teacher, what)
        if ours != theirs:
            raise ValueError(
                f"model and teacher disagree on {what}: {ours} against {theirs}; both see the same "
                "images, so build the model with the teacher's settings"
            )

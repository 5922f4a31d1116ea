"""Evaluation of a quantized model beside the float model it came from."""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from qat.models import num_classes_of


class Comparison(LightningModule):
    """Accuracy of both models, and how far the one departs from the other.

    Args:
        model: The quantized model.
        original: The float model.
    """

    def __init__(self, model: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self.model, self.original = model, original
        classes = num_classes_of(model)
        self.top1, self.top1_float, self.agreement = (
            MulticlassAccuracy(classes, average="micro") for _ in range(3)
        )
        self.top5 = MulticlassAccuracy(classes, average="micro", top_k=5) if classes > 5 else None
        self.num_images, self.error, self.energy = SumMetric(), SumMetric(), SumMetric()

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Run both models on one batch."""
        images, labels = batch
        logits, exact = self.model(images).float(), self.original(images).float()
        self.top1(logits, labels)
        self.top1_float(exact, labels)
        self.agreement(logits, exact.argmax(1))
        if self.top5 is not None:
            self.top5(logits, labels)
        self.num_images(len(labels))
        self.error((logits - exact).square().sum())
        self.energy(exact.square().sum())

    def items(self) -> dict[str, Any]:
        """The results, for `metrics.json`; call it when all batches are done."""
        rates = ["top1", "top1_float", "agreement"] + ["top5"] * (self.top5 is not None)
        return {
            **{name: float(getattr(self, name).compute()) for name in rates},
            "logit_error": float(torch.sqrt(self.error.compute() / self.energy.compute())),
            "n_images": int(self.num_images.compute()),
        }

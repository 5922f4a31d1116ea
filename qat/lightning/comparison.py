"""Evaluation of a quantized model beside the float model it came from."""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import nn
from torchmetrics import MeanMetric, SumMetric

from qat.data.samples import LabelledBatch
from qat.lightning.answers import hits, logits_of, require_answers
from qat.models import num_classes_of


class Comparison(LightningModule):
    """Accuracy of both models, and how far the one departs from the other.

    A refused image is wrong for both models, and left out of agreement and distance. Images without
    labels have no accuracy.

    Args:
        model: The quantized model.
        original: The float model.
        labelled: Whether the images have labels.
    """

    def __init__(self, model: nn.Module, original: nn.Module, labelled: bool = True) -> None:
        super().__init__()
        self.labelled = labelled
        self.model, self.original = model, original
        self.top1, self.top1_float, self.agreement = (MeanMetric() for _ in range(3))
        self.top5 = MeanMetric() if num_classes_of(model) > 5 else None
        self.num_images, self.num_refused = SumMetric(), SumMetric()
        self.error, self.energy = (SumMetric(nan_strategy="disable") for _ in range(2))

    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        """Run both models on one batch."""
        images, labels, faults = LabelledBatch(*batch)
        self.num_images(len(labels) + len(faults))
        self.num_refused(len(faults))
        logits, exact = (logits_of(m, images) for m in (self.model, self.original))
        self.agreement(hits(logits, exact.argmax(1)))
        if self.labelled:
            self.top1(hits(logits, labels, 1, len(faults)))
            self.top1_float(hits(exact, labels, 1, len(faults)))
            if self.top5 is not None:
                self.top5(hits(logits, labels, 5, len(faults)))
        self.error((logits - exact).square().sum())
        self.energy(exact.square().sum())

    def items(self) -> dict[str, Any]:
        """The results, for `metrics.json`; call it when all batches are done."""
        num_images, num_refused = int(self.num_images.compute()), int(self.num_refused.compute())
        require_answers(num_images, num_refused)
        rates = ["agreement"]
        if self.labelled:
            rates += ["top1", "top1_float"] + ["top5"] * (self.top5 is not None)
        return {
            **{name: float(getattr(self, name).compute()) for name in rates},
            "logit_error": float(torch.sqrt(self.error.compute() / self.energy.compute())),
            "n_images": num_images,
            "n_refused": num_refused,
            **({} if self.labelled else {"n_labelled": 0}),
        }

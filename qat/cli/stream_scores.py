"""Scores of an adapting model and of the original over a stream, domain by domain."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qat.data.protocols import CLEAN

BINS = 15
"""Bins of confidence in the expected calibration error."""


class Scores:
    """Counts of images, errors and confidences; all of it is tensors, so that a run can resume.

    An image that was refused counts as an error of both models; it has no confidence.

    Args:
        domains: Names of the domains.
        num_classes: Number of classes.
    """

    def __init__(self, domains: list[str], num_classes: int) -> None:
        self.domains = domains
        size = len(domains)
        self.tensors = {
            "images": torch.zeros(size, num_classes, dtype=torch.int64),
            "refused": torch.zeros(size, num_classes, dtype=torch.int64),
        }
        for who in ("adapted", "source"):
            self.tensors[f"{who}.errors"] = torch.zeros(size, num_classes, dtype=torch.int64)
            for what in ("confidence", "correct", "count"):
                bins = torch.zeros(size, BINS, dtype=torch.float64)
                self.tensors[f"{who}.{what}"] = bins

    def add(
        self,
        logits: Float[Tensor, "n c"],
        source: Float[Tensor, "n c"],
        labels: Int64[Tensor, " n"],
        domains: tuple[str, ...],
    ) -> dict[str, float]:
        """Count a batch; rows of NaN in `logits` were refused.

        Returns:
            Errors of the adapted model and of the original, as shares of the images.
        """
        places = torch.tensor([self.domains.index(name) for name in domains])
        valid = logits.isfinite().all(1)
        _count(self.tensors["images"], (places, labels), torch.ones_like(labels))
        _count(self.tensors["refused"], (places, labels), (~valid).long())
        shares = []
        for who, answers in (("adapted", logits), ("source", source)):
            confidence, classes = answers.softmax(1).max(1)
            wrong = (classes != labels) | ~valid
            _count(self.tensors[f"{who}.errors"], (places, labels), wrong.long())
            shares.append(float(wrong.float().mean()))
            confidence, right = confidence[valid], ~wrong[valid]
            bins = (places[valid], (confidence * BINS).long().clamp(max=BINS - 1))
            _count(self.tensors[f"{who}.confidence"], bins, confidence.double())
            _count(self.tensors[f"{who}.correct"], bins, right.double())
            _count(self.tensors[f"{who}.count"], bins, torch.ones_like(confidence).double())
        return {"error": round(shares[0], 6), "error_source": round(shares[1], 6)}

    def table(self) -> list[dict[str, Any]]:
        """A row for each domain."""
        rows = []
        for place, name in enumerate(self.domains):
            given = int(self.tensors["images"][place].sum())
            refused = int(self.tensors["refused"][place].sum())
            row = {"corruption": name, "n_images": given, "n_refused": refused}
            for who, suffix in (("adapted", ""), ("source", "_source")):
                errors = self.tensors[f"{who}.errors"][place]
                seen = self.tensors["images"][place]
                present = seen > 0
                row[f"error{suffix}"] = int(errors.sum()) / max(given, 1)
                classes = (errors[present] / seen[present]).mean() if present.any() else 0.0
                row[f"error_class_mean{suffix}"] = float(classes)
                row[f"ece{suffix}"] = self._calibration_error(who, place)
            rows.append(row)
        return rows

    def summary(self) -> dict[str, Any]:
        """Means over the corruptions, each with the same weight, and the worst of them."""
        table = self.table()
        corrupted = [row for row in table if row["corruption"] != CLEAN] or table

        def average(key: str) -> float:
            return sum(row[key] for row in corrupted) / len(corrupted)

        worst = max(corrupted, key=lambda row: row["error"])
        losses = {row["corruption"]: row["error"] - row["error_source"] for row in table}
        hurt = max(losses, key=lambda name: losses[name])
        return {
            "error_mean": average("error"),
            "error_worst": worst["error"],
            "worst_corruption": worst["corruption"],
            "error_source_mean": average("error_source"),
            "error_class_mean": average("error_class_mean"),
            "ece_mean": average("ece"),
            "ece_source_mean": average("ece_source"),
            "loss_worst": losses[hurt],
            "loss_worst_corruption": hurt,
            "n_images": sum(row["n_images"] for row in table),
            "n_refused": sum(row["n_refused"] for row in table),
            "table": table,
        }

    def _calibration_error(self, who: str, place: int) -> float:
        confidence, correct, count = (
            self.tensors[f"{who}.{what}"][place] for what in ("confidence", "correct", "count")
        )
        return float((confidence - correct).abs().sum() / count.sum().clamp(min=1))


class Agreement:
    """How often an adapting model answers as the original does, where no class is known.

    A refused image has no answer, and so no part in it.
    """

    def __init__(self) -> None:
        self.tensors = {"counts": torch.zeros(3, dtype=torch.int64)}

    def add(
        self,
        logits: Float[Tensor, "n c"],
        source: Float[Tensor, "n c"],
        labels: Int64[Tensor, " n"],
        domains: tuple[str, ...],
    ) -> dict[str, float]:
        """Count a batch; rows of NaN in `logits` were refused.

        Returns:
            The share of equal answers.
        """
        valid = logits.isfinite().all(1)
        same = (logits.argmax(1) == source.argmax(1)) & valid
        self.tensors["counts"] += torch.stack([same.sum(), valid.sum(), torch.tensor(len(valid))])
        return {"agreement": round(float(same.sum() / valid.sum().clamp(min=1)), 6)}

    def summary(self) -> dict[str, Any]:
        """The share of equal answers, and counts of images."""
        same, valid, given = self.tensors["counts"].tolist()
        counts = {"n_images": given, "n_refused": given - valid, "n_labelled": 0}
        return {"agreement": same / max(valid, 1), **counts}


def _count(into: Tensor, places: tuple[Tensor, Tensor], values: Tensor) -> None:
    into.index_put_(places, values, accumulate=True)

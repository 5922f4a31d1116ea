"""A memory of images, balanced over predicted classes and aware of time, as RoTTA keeps it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.tta.answer import State

EMPTY = -1
"""Label of a place that holds no image."""


@dataclass(eq=False)
class Memory:
    """Places for K images; `copy` before adding, where the tensors belong to a saved state.

    Attributes:
        images: (K, channels, height, width).
        labels: (K,) predicted class of each, `EMPTY` where there is none.
        ages: (K,) images added since.
        uncertainties: (K,) entropy of the prediction over ln C.
        num_classes: Number of classes C.
    """

    images: Tensor
    labels: Tensor
    ages: Tensor
    uncertainties: Tensor
    num_classes: int

    @staticmethod
    def empty(capacity: int, shape: tuple[int, ...], like: Tensor) -> "Memory":
        """A memory without images."""
        return Memory(
            like.new_zeros(capacity, *shape),
            torch.full((capacity,), EMPTY),
            torch.zeros(capacity),
            torch.zeros(capacity),
            0,
        )

    def tensors(self) -> State:
        """All but the number of classes."""
        return {name: getattr(self, name) for name in ("images", "labels", "ages", "uncertainties")}

    def copy(self) -> "Memory":
        """A memory with tensors of its own."""
        own = {name: value.clone() for name, value in self.tensors().items()}
        return Memory(**own, num_classes=self.num_classes)

    def __len__(self) -> int:
        """Images in it."""
        return int((self.labels != EMPTY).sum())

    def content(self) -> tuple[Tensor, Tensor]:
        """The images and their ages."""
        held = self.labels != EMPTY
        return self.images[held.to(self.images.device)], self.ages[held].to(self.images.device)

    def add(self, image: Tensor, label: int, uncertainty: float) -> None:
        """Offer an image; whether it enters or not, the others grow older by one."""
        place = self._place(label, 0.5 + uncertainty)
        if place is not None:
            self.images[place] = image
            self.labels[place], self.uncertainties[place] = label, uncertainty
            self.ages[place] = 0
        self.ages[self.labels != EMPTY] += 1

    def _place(self, label: int, score: float) -> int | None:
        """Where an image of a class and a score goes; None if nowhere."""
        counts = torch.bincount(self.labels[self.labels != EMPTY], minlength=self.num_classes)
        if int(counts[label]) < len(self.labels) / self.num_classes:
            free = (self.labels == EMPTY).nonzero()
            if len(free):
                return int(free[0])
            among = (counts == counts.max())[self.labels]
        else:
            among = self.labels == label
        scores = torch.sigmoid(self.ages / len(self.labels)) + self.uncertainties
        scores = scores.masked_fill(~among, -torch.inf)
        worst = int(scores.argmax())
        return worst if float(scores[worst]) > score else None

"""A bounded queue in front of an adapter: when batches pile up, adapting waits, answers do not."""

from collections import deque
from collections.abc import Hashable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from qat.models import num_classes_of
from qat.tta.adapter import Adapter
from qat.tta.answer import Answer, Outcome, Refused


class Desk:
    """Takes batches in, answers them in order, each exactly once.

    Args:
        adapter: What answers.
        capacity: Batches that may wait.
        patience: Batches that may wait before adapting is skipped.

    Raises:
        ValueError: If nothing may wait, or more than the capacity before adapting is skipped.
    """

    def __init__(self, adapter: Adapter, capacity: int = 64, patience: int = 1) -> None:
        if not 0 <= patience < capacity:
            raise ValueError(
                f"patience must be 0 to capacity - 1, got {patience} with capacity {capacity}"
            )
        self.adapter = adapter
        self.capacity, self.patience = capacity, patience
        self.waiting: deque[tuple[Hashable, Any]] = deque()
        self.num_declined = 0

    def take(self, ticket: Hashable, images: Any) -> bool:
        """Put a copy of a batch into the queue; False, and counted, if the queue is full.

        Args:
            ticket: What the answer is returned with.
            images: The batch; whoever gave it may fill it anew.
        """
        if len(self.waiting) == self.capacity:
            self.num_declined += 1
            return False
        own = images.detach().clone() if isinstance(images, Tensor) else deepcopy(images)
        self.waiting.append((ticket, own))
        return True

    def answer(self) -> tuple[Hashable, Answer] | None:
        """Answer the batch that waits longest; None if none waits.

        A batch that is refused as a whole, or that answering fails on, gets an answer too: rows of
        NaN, and the reason. An interrupt leaves the batch in its place.
        """
        if not self.waiting:
            return None
        ticket, images = self.waiting.popleft()
        hurry = len(self.waiting) > self.patience
        try:
            return ticket, self.adapter.adapt(images, hurry=hurry)
        except Exception as error:  # whatever fails, a ticket has its answer
            return ticket, self._failure(images, error)
        except BaseException:
            self.waiting.appendleft((ticket, images))
            raise

    def _failure(self, images: Any, error: Exception) -> Answer:
        """What stands for an answer that there is not, a row for each of the images."""
        size = len(images) if isinstance(images, Tensor) and images.ndim else 0
        logits = torch.full((size, num_classes_of(self.adapter.on.model)), torch.nan)
        refused = isinstance(error, Refused)
        why = error.code if refused else "unanswerable"
        outcome = Outcome.SKIPPED if refused else Outcome.ROLLED_BACK
        reason = str(error) if refused else f"{type(error).__name__}: {error}"
        return Answer(logits, (why,) * size, outcome, reason)

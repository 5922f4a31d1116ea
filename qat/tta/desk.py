"""A bounded queue in front of an adapter: when batches pile up, adapting waits, answers do not."""

from collections import deque
from collections.abc import Hashable

from torch import Tensor

from qat.tta.adapter import Adapter
from qat.tta.answer import Answer


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
        self.waiting: deque[tuple[Hashable, Tensor]] = deque()
        self.num_declined = 0

    def take(self, ticket: Hashable, images: Tensor) -> bool:
        """Put a batch into the queue; False, and counted, if the queue is full.

        Args:
            ticket: What the answer is returned with.
            images: The batch.
        """
        if len(self.waiting) == self.capacity:
            self.num_declined += 1
            return False
        self.waiting.append((ticket, images))
        return True

    def answer(self) -> tuple[Hashable, Answer] | None:
        """Answer the batch that waits longest; None if none waits.

        Raises:
            Refused: If it is no batch of images; it has left the queue then.
        """
        if not self.waiting:
            return None
        ticket, images = self.waiting.popleft()
        hurry = len(self.waiting) > self.patience
        return ticket, self.adapter.adapt(images, hurry=hurry)

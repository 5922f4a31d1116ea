"""Adam on trainable sets: how a stage, or all of them together, are trained."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.reconstruct.trainable import Attachment, Modules, Trainable


@dataclass(frozen=True)
class Descent:
    """Sets in training.

    Attributes:
        attachments: The sets at work.
        optimizer: Adam on their parameters.
        schedule: Lowers the learning rates to zero along a half cosine.
        num_steps: How many steps that takes.
    """

    attachments: list[Attachment]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    num_steps: int

    def step(self, loss: Tensor) -> Tensor:
        """Make a step down a loss and the penalties of the sets; their sum."""
        progress = self.schedule.last_epoch / self.num_steps
        for attachment in self.attachments:
            penalty = attachment.penalty(progress)
            loss = loss if penalty is None else loss + penalty
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        for attachment in self.attachments:
            attachment.after_step()
        return loss


@contextmanager
def descending(
    train: Sequence[Trainable], modules: Modules, num_steps: int
) -> Iterator[Descent | None]:
    """Open trainable sets on modules without trainable parameters, and close them at the end.

    Args:
        train: The sets.
        modules: What they are opened on.
        num_steps: Steps that will be made.

    Yields:
        What makes the steps; None if the sets find no parameter.
    """
    attachments = [choice.attach(modules) for choice in train]
    groups: list[dict[str, Any]] = [g for found in attachments for g in found.groups]
    if not groups:
        yield None
        return
    parameters = [parameter for group in groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    yield Descent(attachments, optimizer, schedule, num_steps)
    for parameter in parameters:
        parameter.requires_grad_(False)
    for attachment in attachments:
        attachment.close()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of a model is trainable within the block, but what `descending` opens."""
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trainable)

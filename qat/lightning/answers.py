"""A classifier's answers, counting the images that it could not be given."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from qat.models import num_classes_of


def logits_of(model: nn.Module, images: Tensor) -> Float[Tensor, "n c"]:
    """Logits of a batch, in single precision; none where no image could be read."""
    if not len(images):
        return images.new_zeros(0, num_classes_of(model))
    return model(images).float()


def hits(
    logits: Float[Tensor, "n c"], labels: Int64[Tensor, " n"], top: int = 1, num_refused: int = 0
) -> Float[Tensor, " m"]:
    """Whether each answer is right, 1 or 0; a refused image is a wrong one, so m = n + refused.

    Args:
        logits: The answers.
        labels: The right classes.
        top: How many of the largest logits count as the answer.
        num_refused: Images of the batch that could not be read.
    """
    best = logits.argmax(1, keepdim=True) if top == 1 else logits.topk(top).indices
    right = (best == labels[:, None]).any(1)
    return torch.cat([right, right.new_zeros(num_refused)]).float()


def require_answers(n_images: int, n_refused: int) -> None:
    """Refuse an evaluation of which nothing could be read.

    Raises:
        ValueError: If every image was refused.
    """
    if n_images == n_refused:
        raise ValueError(
            f"none of the {n_images} evaluation images can be read; the warnings above say why"
        )

"""Arithmetic of adaptation as pure functions; C classes, natural logarithms."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def entropy(logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Entropy of the softmax of each row, in nats.

    Example:
        >>> entropy(torch.zeros(1, 4)) / torch.tensor(4.0).log()
        tensor([1.])
    """
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def cross_entropy(
    logits: Float[Tensor, "n c"], target: Float[Tensor, "n c"]
) -> Float[Tensor, " n"]:
    """Cross-entropy of the softmax of each row with a distribution."""
    return -(target * logits.log_softmax(1)).sum(1)


def entropy_of(probabilities: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch"]:
    """Entropy of distributions, in nats; zero times log zero is zero."""
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


def one_hot(classes: Int64[Tensor, " n"], num_classes: int) -> Float[Tensor, "n c"]:
    """Distributions that are certain of one class."""
    return torch.nn.functional.one_hot(classes, num_classes).float()


def moved(old: Tensor, new: Tensor, share: float) -> Tensor:
    """Exponential moving average, `(1 - share) old + share new`."""
    return old + share * (new - old)

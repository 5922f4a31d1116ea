"""The likelihood of a model's own answers, whose gradient says what they depend on."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

TARGETS = ("sampled", "predicted", "labels")


def check_target(target: str) -> None:
    """Refuse a kind of target that does not exist."""
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got '{target}'")


def log_likelihoods(
    logits: Float[Tensor, "batch classes"],
    target: str,
    labels: Int[Tensor, " batch"] | None,
    generator: torch.Generator,
) -> Float[Tensor, " batch"]:
    """`log p(y)` of each image, for a y of the kind asked for.

    Args:
        logits: Of the model.
        target: `sampled` draws y from the model's prediction, so that squared gradients estimate
            the Fisher information, the curvature of the divergence from the model's own output;
            `predicted` takes its top class; `labels` the label.
        labels: Classes of the images, for `labels`.
        generator: Draws the samples.
    """
    log_p = F.log_softmax(logits.float(), -1)
    if target == "sampled":
        p = log_p.detach().exp().cpu()
        y = torch.multinomial(p, 1, generator=generator).to(logits.device)
    elif target == "predicted":
        y = log_p.argmax(-1, keepdim=True)
    else:
        assert labels is not None
        y = labels.to(logits.device)[:, None]
    return log_p.gather(1, y)[:, 0]

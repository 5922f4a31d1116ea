"""Separable CMA-ES: search of a minimum without gradients, one variance a coordinate.

Ros and Hansen, PPSN 2008. With N coordinates, K candidates and the best half weighted by
log(K/2 + 1/2) - log(rank), in Hansen's notation:

    x_k      = m + s d z_k,  z_k ~ N(0, I)
    m        <- m + s d z_w,  z_w the weighted mean of the best z
    p_s      <- (1 - c_s) p_s + sqrt(c_s (2 - c_s) mu) z_w
    s        <- s exp(c_s / d_s (|p_s| / E|N(0, I)| - 1))
    p_c      <- (1 - c_c) p_c + h sqrt(c_c (2 - c_c) mu) d z_w
    d^2      <- (1 - c_1 - c_mu) d^2 + c_1 p_c^2 + c_mu sum_k w_k (d z_k)^2

Constants are the standard ones, the learning rates of d^2 larger by (N + 2) / 3 because only N
values are learned. Provenance: textbook.
"""

from math import log, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from qat.tta.answer import State


def start(size: int, step: float, like: Tensor) -> State:
    """The search before the first generation, around zero."""
    zeros = like.new_zeros(size)
    return {
        "mean": zeros,
        "step": like.new_tensor(step),
        "variance": torch.ones_like(zeros),
        "path_step": zeros,
        "path_variance": zeros,
        "generations": like.new_zeros(()),
    }


def sample(state: State, num: int, generator: torch.Generator) -> Float[Tensor, "num size"]:
    """Standard normal draws z of one generation."""
    size = len(state["mean"])
    return torch.randn(num, size, generator=generator, device=state["mean"].device)


def candidates(state: State, draws: Float[Tensor, "num size"]) -> Float[Tensor, "num size"]:
    """The points that draws stand for."""
    return state["mean"] + state["step"] * state["variance"].sqrt() * draws


def update(state: State, draws: Float[Tensor, "num size"], losses: Float[Tensor, " num"]) -> State:
    """The search after a generation.

    Args:
        state: The search before it.
        draws: Its draws.
        losses: Loss of the candidate of each.
    """
    num, size = draws.shape
    best = draws[losses.argsort()[: num // 2]]
    ranks = torch.arange(1, len(best) + 1, device=draws.device)
    weights = log((num + 1) / 2) - ranks.log()
    weights = weights / weights.sum()
    mu = float(1 / weights.square().sum())
    c_s = (mu + 2) / (size + mu + 5)
    d_s = 1 + 2 * max(0.0, sqrt((mu - 1) / (size + 1)) - 1) + c_s
    c_c = (4 + mu / size) / (size + 4 + 2 * mu / size)
    faster = (size + 2) / 3
    c_1 = min(1.0, faster * 2 / ((size + 1.3) ** 2 + mu))
    c_mu = min(1 - c_1, faster * 2 * (mu - 2 + 1 / mu) / ((size + 2) ** 2 + mu))
    expected = sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))
    deviation = state["variance"].sqrt()
    mean_draw = weights @ best
    path_step = (1 - c_s) * state["path_step"] + sqrt(c_s * (2 - c_s) * mu) * mean_draw
    generations = state["generations"] + 1
    length = path_step.norm() / (1 - (1 - c_s) ** (2 * generations)).sqrt()
    going = (length < (1.4 + 2 / (size + 1)) * expected).float()
    path = (1 - c_c) * state["path_variance"]
    path = path + going * sqrt(c_c * (2 - c_c) * mu) * deviation * mean_draw
    spread = weights @ (deviation * best).square()
    variance = (1 - c_1 - max(c_mu, 0.0)) * state["variance"]
    return {
        "mean": state["mean"] + state["step"] * deviation * mean_draw,
        "step": state["step"] * (c_s / d_s * (path_step.norm() / expected - 1)).exp(),
        "variance": variance + c_1 * path.square() + max(c_mu, 0.0) * spread,
        "path_step": path_step,
        "path_variance": path,
        "generations": generations,
    }

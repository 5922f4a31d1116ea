"""Optimizers as pure functions: parameters and state in, new ones out.

torch's change their parameters in place, which a step that may be undone would have to copy and
restore. These make new tensors, so a step that fails has changed nothing.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qat.tta.answer import State


class Optimizer(ABC):
    """A rule of descent; subclasses are frozen dataclasses."""

    @abstractmethod
    def start(self, params: Float[Tensor, " p"]) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(
        self, params: Float[Tensor, " p"], grad: Float[Tensor, " p"], state: State
    ) -> tuple[Float[Tensor, " p"], State]:
        """New parameters and state."""


@dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent with momentum, as `torch.optim.SGD`: `b <- m b + g; p <- p - lr b`.

    Attributes:
        lr: Learning rate.
        momentum: Share of the last direction that is kept.
    """

    lr: float = 1e-3
    momentum: float = 0.9

    def __post_init__(self) -> None:
        require_rate(self.lr)

    def start(self, params: Float[Tensor, " p"]) -> State:
        """No direction."""
        return {"direction": torch.zeros_like(params)}

    def step(
        self, params: Float[Tensor, " p"], grad: Float[Tensor, " p"], state: State
    ) -> tuple[Float[Tensor, " p"], State]:
        """New parameters and direction."""
        direction = self.momentum * state["direction"] + grad
        return params - self.lr * direction, {"direction": direction}


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba, ICLR 2015, https://arxiv.org/abs/1412.6980), as `torch.optim.Adam`.

    Attributes:
        lr: Learning rate.
        betas: Shares of the running first and second moment that are kept.
        eps: Added to the root of the second moment.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        require_rate(self.lr)

    def start(self, params: Float[Tensor, " p"]) -> State:
        """Zero moments."""
        zeros = torch.zeros_like(params)
        return {"first": zeros, "second": zeros, "steps": torch.zeros(())}

    def step(
        self, params: Float[Tensor, " p"], grad: Float[Tensor, " p"], state: State
    ) -> tuple[Float[Tensor, " p"], State]:
        """New parameters and moments."""
        steps = state["steps"] + 1
        first = state["first"].lerp(grad, 1 - self.betas[0])
        second = self.betas[1] * state["second"] + (1 - self.betas[1]) * grad.square()
        scale = (second / (1 - self.betas[1] ** steps)).sqrt() + self.eps
        update = first / (1 - self.betas[0] ** steps) / scale
        return params - self.lr * update, {"first": first, "second": second, "steps": steps}


def require_rate(lr: float) -> None:
    """Refuse a learning rate at which no parameter moves towards a lower loss."""
    if not lr > 0:
        raise ValueError(f"lr must be above 0, got {lr}; use qat.tta.Source to leave a model alone")

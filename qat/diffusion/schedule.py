"""The noise schedule: how much of an image is left at each time step."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """Linear betas, Ho et al., NeurIPS 2020, https://arxiv.org/abs/2006.11239.

        x_t = sqrt(A_t) x_0 + sqrt(1 - A_t) eps,   A_t = prod_{s <= t} (1 - beta_s)

    Attributes:
        num_steps: Number of time steps.
        first: beta of the first step.
        last: beta of the last one.

    Raises:
        ValueError: If there is no step or the betas do not lie in (0, 1) in order.
    """

    num_steps: int = 1000
    first: float = 1e-4
    last: float = 0.02

    def __post_init__(self) -> None:
        if self.num_steps < 1 or not 0 < self.first <= self.last < 1:
            raise ValueError(
                "NoiseSchedule needs a step and 0 < first <= last < 1, got "
                f"{self.num_steps}, {self.first} and {self.last}"
            )

    def betas(self) -> Float[Tensor, " steps"]:
        """Share of noise that each step adds, in double precision."""
        return torch.linspace(self.first, self.last, self.num_steps, dtype=torch.float64)

    def signal(self) -> Float[Tensor, " steps"]:
        """A_t, the share of the image's variance that is left after each step."""
        return (1 - self.betas()).cumprod(0)

    def add_noise(
        self,
        images: Float[Tensor, "batch c h w"],
        noise: Float[Tensor, "batch c h w"],
        times: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch c h w"]:
        """Noisy images at given time steps."""
        left = self.signal().to(images)[times][:, None, None, None]
        return left.sqrt() * images + (1 - left).sqrt() * noise

    def spread(self, count: int) -> Int[Tensor, " count"]:
        """Time steps in the middle of `count` equal parts, in order."""
        return ((torch.arange(count) + 0.5) * self.num_steps / count).long()

"""Oscillation of quantized weights, and use of binary activations, as running statistics.

With code c_t of a weight after step t, a flip is c_t != c_{t-1}. A flip is an oscillation if it
undoes the direction of the weight's flip before (Nagel et al. 2022, https://arxiv.org/abs/2203.11086);
for binary weights every flip after the first is one. The frequency of a weight is the moving
average f_t = m * o_t + (1 - m) * f_{t-1}, m = `momentum`; it oscillates if f > 0.005.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from qat.ops import token_axes


class Oscillation:
    """Flips and oscillations of the codes of one weight.

    Args:
        codes: Codes at the start, any shape.
        momentum: Of the oscillation frequency.
    """

    def __init__(self, codes: Shaped[Tensor, "*shape"], momentum: float = 0.01) -> None:
        self.momentum = momentum
        self.start = codes.clone()
        self.previous = codes.clone()
        self.direction = torch.zeros_like(codes, dtype=torch.int8)
        self.frequency = torch.zeros_like(codes, dtype=torch.float32)
        self.num_flips = 0
        self.num_steps = 0

    def update(self, codes: Shaped[Tensor, "*shape"], count_oscillations: bool = True) -> None:
        """See the codes after one more step.

        Args:
            codes: Codes, in the shape of those at the start.
            count_oscillations: Move frequencies; off during a warm-up.
        """
        step = (codes.to(torch.int16) - self.previous.to(torch.int16)).sign().to(torch.int8)
        flipped = step != 0
        if count_oscillations:
            oscillated = flipped & (step == -self.direction)
            self.frequency.lerp_(oscillated.float(), self.momentum)
        self.direction = torch.where(flipped, step, self.direction)
        self.previous.copy_(codes)
        self.num_flips += int(flipped.sum())
        self.num_steps += 1

    def to(self, device: torch.device) -> None:
        """Move the state to a device."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def take_flips(self) -> tuple[int, int]:
        """Flips, and weights times steps, since the last call."""
        taken = self.num_flips, self.num_steps * self.start.numel()
        self.num_flips = self.num_steps = 0
        return taken

    def oscillating(self, threshold: float = 0.005) -> Bool[Tensor, "*shape"]:
        """Which weights oscillate."""
        return self.frequency > threshold

    def changed(self) -> Bool[Tensor, "*shape"]:
        """Which weights have another code than at the start: net changes, not flips."""
        return self.previous != self.start

    def state_dict(self) -> dict[str, Any]:
        """State, for a checkpoint."""
        return dict(vars(self))

    @staticmethod
    def from_state(state: dict[str, Any]) -> "Oscillation":
        """Continue from a state."""
        restored = Oscillation(state["start"], state["momentum"])
        vars(restored).update(state)
        return restored


def positive_share(x: Shaped[Tensor, "..."], shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """Share of positive values in each channel, over batch and tokens.

    Args:
        x: Values of a batch.
        shape: Trailing shape of the operand.
    """
    return (x > 0).float().mean([0, *token_axes(x, shape)])


def imbalance(share: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Mean over channels of |2 p - 1|: 0 where both signs are equally frequent, 1 where one is.

    Args:
        share: Share p of one sign in each channel.
    """
    return (2 * share - 1).abs().mean()


def sign_statistics(
    codes: Shaped[Tensor, "..."], shape: tuple[int, ...], dead_below: float = 0.02
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sign entropy in bits and share of dead channels of +1 / -1 codes, over channels.

    With p the share of +1 in a channel, the entropy is -p log2 p - (1-p) log2 (1-p), and the
    channel is dead if p is below `dead_below` or above 1 - `dead_below`.

    Args:
        codes: Codes of a batch.
        shape: Trailing shape of the operand.
        dead_below: Share below which one of the signs counts as absent.
    """
    share = positive_share(codes, shape)
    entropy = torch.special.entr(share) + torch.special.entr(1 - share)
    dead = (share < dead_below) | (share > 1 - dead_below)
    return entropy.mean() / torch.log(torch.tensor(2.0)), dead.float().mean()

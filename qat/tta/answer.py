"""What an adapting model gives back for a batch, and what it does not take in.

A row that holds NaN, infinity or values no image has is refused before the forward pass, alone: the
other rows are answered exactly as if it had never been in the batch. Masking its loss would not do,
because zero times NaN is NaN in the backward pass. A batch of the wrong form is refused as a whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qat.preprocessing import Preprocessing

State = Mapping[str, Tensor]
"""Named tensors that a method carries from batch to batch. A step makes a new mapping with new
tensors; none is ever changed in place, so the old state is whole whatever happens in the step."""


class Outcome(StrEnum):
    """What became of the state of a method in one batch."""

    KEPT = "kept"  # the method has nothing to adapt
    ADAPTED = "adapted"
    SKIPPED = "skipped"  # nothing in the batch was worth a step
    ROLLED_BACK = "rolled back"  # the step failed; the state is that before it
    RESET = "reset"  # the state is that of the start


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer to a batch of N images over C classes.

    Attributes:
        logits: Logits; the row of a refused image is NaN, never a guess.
        refusals: For each row why it was refused, None where it was answered.
        outcome: What became of the state.
        reason: Why the step was skipped, rolled back or followed by a reset; else empty.
        num_selected: Images whose loss entered the step.
        num_forward: Images sent forward through the model, each time counted.
        num_backward: Images sent backward through the model, each time counted.
    """

    logits: Float[Tensor, "n c"]
    refusals: tuple[str | None, ...]
    outcome: Outcome
    reason: str = ""
    num_selected: int = 0
    num_forward: int = 0
    num_backward: int = 0


@dataclass(frozen=True, eq=False)
class Step:
    """What one step of a method makes of a clean batch of N images.

    Attributes:
        logits: Logits, without gradient.
        state: The state after the step.
        num_selected: Images whose loss entered the step.
        num_forward: Images sent forward, each time counted.
        num_backward: Images sent backward, each time counted.
        reset: Why the method wants to start anew after this batch; empty if it does not.
    """

    logits: Float[Tensor, "n c"]
    state: State
    num_selected: int = 0
    num_forward: int = 0
    num_backward: int = 0
    reset: str = ""


Code = Literal["type", "rank", "channels", "size", "dtype", "device", "empty"]


class Refused(ValueError):
    """A batch that cannot be images for the model; the method is as it was before.

    Args:
        code: What is wrong, one word.
        message: What is wrong, what was expected, what to try.
    """

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Intake:
    """What images must look like.

    Attributes:
        shape: Channels, height and width.
        limit: Largest magnitude that a preprocessed pixel may have.
    """

    shape: tuple[int, int, int]
    limit: float

    @staticmethod
    def of(preprocessing: Preprocessing) -> "Intake":
        """Pixels up to twice as far from zero as black or white, so that 0..255 is refused."""
        ends = [
            abs((end - mean) / std)
            for mean, std in zip(preprocessing.mean, preprocessing.std, strict=True)
            for end in (0.0, 1.0)
        ]
        return Intake(preprocessing.input_size, 2 * max(ends))

    def admit(self, images: Any, like: Tensor) -> Tensor:
        """The batch in the model's dtype, detached and contiguous.

        Other floating types are converted, which a refusal of the rows that overflow follows.

        Args:
            images: What was given.
            like: A parameter of the model.

        Raises:
            Refused: If it is no batch of images for the model.
        """
        if not isinstance(images, Tensor):
            raise Refused("type", f"images must be a tensor, got {type(images).__name__}")
        if not images.is_floating_point():
            raise Refused(
                "dtype",
                f"images must be preprocessed floating-point pixels, got {images.dtype}; "
                "normalize them by qat.card_of(model).preprocessing",
            )
        if images.ndim != 4:
            raise Refused(
                "rank",
                f"images must be (N, {', '.join(map(str, self.shape))}), got "
                f"{tuple(images.shape)}; give a single image as images[None]",
            )
        for code, found, wanted in (
            ("channels", images.shape[1:2], self.shape[:1]),
            ("size", images.shape[2:], self.shape[1:]),
        ):
            if tuple(found) != wanted:
                raise Refused(
                    code,  # type: ignore[arg-type]
                    f"images have {code} {tuple(found)}, the model expects {wanted}; preprocess "
                    "them by qat.card_of(model).preprocessing",
                )
        if not len(images):
            raise Refused("empty", "the batch is empty; leave it out of the stream")
        if images.device != like.device:
            raise Refused(
                "device", f"images are on {images.device}, the model is on {like.device}; move them"
            )
        return trainable(images.detach().to(like.dtype).contiguous())

    def refusals(self, images: Float[Tensor, "n c h w"]) -> tuple[str | None, ...]:
        """For each row why it is refused, None where it is taken in."""
        # Largest magnitude of each row; NaN and infinity come through.
        worst = images.flatten(1).abs().amax(1).tolist()
        return tuple(self._refusal(value) for value in worst)

    def _refusal(self, magnitude: float) -> str | None:
        if magnitude != magnitude:
            return "nan"
        if magnitude == float("inf"):
            return "infinite"
        if magnitude > self.limit:
            return "magnitude"
        return None


def trainable(images: Tensor) -> Tensor:
    """The images; a copy where they come from `torch.inference_mode()`, which no gradient passes.

    To be called outside of that mode.
    """
    return images.clone() if images.is_inference() else images


def scattered(rows: Float[Tensor, "m c"], kept: Bool[Tensor, " n"]) -> Float[Tensor, "n c"]:
    """Rows in their places among `kept`, NaN elsewhere."""
    out = rows.new_full((len(kept), rows.shape[1]), torch.nan)
    out[kept] = rows
    return out

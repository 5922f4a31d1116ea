"""The adapter: a method at work on one stream.

It holds the state, refuses bad rows, and makes every step a transaction. Because a step never
changes the state that it is given, rolling back means not taking the new one.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat.card import expected_by
from qat.models import num_classes_of
from qat.tta.answer import Answer, Intake, Outcome, State, Step, scattered, trainable
from qat.tta.base import Method
from qat.tta.guard import Guard
from qat.tta.overlay import Overlay, uncompiled
from qat.tta.parts import at, part, with_part
from qat.tta.store import require_like, require_tensors_like


@dataclass(frozen=True)
class Counts:
    """What an adapter has done since it was made; a reset does not clear it.

    Attributes:
        position: Batches answered.
        images: Images given.
        refused: Images refused.
        adapted: Batches with a step.
        skipped: Batches with nothing worth a step.
        rolled_back: Batches whose step failed.
        reset: Returns to the start, by the guard or by the method.
        selected: Images whose loss entered a step.
        forward: Images sent forward, each time counted.
        backward: Images sent backward, each time counted.
    """

    position: int = 0
    images: int = 0
    refused: int = 0
    adapted: int = 0
    skipped: int = 0
    rolled_back: int = 0
    reset: int = 0
    selected: int = 0
    forward: int = 0
    backward: int = 0

    def plus(self, answer: Answer) -> "Counts":
        """The counts after an answer."""
        added = {
            "position": 1,
            "images": len(answer.refusals),
            "refused": sum(reason is not None for reason in answer.refusals),
            "selected": answer.num_selected,
            "forward": answer.num_forward,
            "backward": answer.num_backward,
            answer.outcome.name.lower(): 1,
        }
        added.pop("kept", None)
        return replace(self, **{key: getattr(self, key) + n for key, n in added.items()})


@final
class Adapter:
    """A model that adapts to one stream; several may share the model.

    It leaves `torch.inference_mode()` and `torch.no_grad()` by itself.

    Args:
        model: A model from `qat.timm_model`, float or quantized; it is frozen and not changed.
        method: How it adapts.
        calibration: Batches of clean images without labels; some methods need them.
        guard: Watches the method, see `qat.tta.guard`; None leaves it alone.
        seed: Seeds what the method draws.

    Raises:
        ValueError: If the method has nothing to adapt in this model, or lacks images.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        method: Method,
        calibration: Iterable[Tensor] = (),
        *,
        guard: Guard | None = None,
        seed: int = 0,
    ) -> None:
        model = uncompiled(model)
        self.method, self.guard, self.seed = method, guard, seed
        self.intake = Intake.of(expected_by(model))
        self.on = Overlay(model, method.parameters(model))
        self.own = self.on.flat()
        clean = [trainable(images) for images in calibration]
        state = with_part({}, "method", method.start(self.on, clean))
        if guard is not None:
            state = with_part(state, "guard", guard.start(num_classes_of(model)))
        self.initial: State = at(self.on.like.device, state)
        self._now: tuple[State, Counts] = (self.initial, Counts())

    @property
    def state(self) -> State:
        """The present state."""
        return self._now[0]

    @property
    def counts(self) -> Counts:
        """What was done so far."""
        return self._now[1]

    @torch.inference_mode(False)
    def adapt(self, images: Any, *, hurry: bool = False) -> Answer:
        """Answer a batch of images and adapt to it.

        Args:
            images: (N, channels, height, width), preprocessed for the model.
            hurry: Answer by the present state, without adapting.

        Raises:
            Refused: If it is no batch of images for the model; nothing has changed then.
        """
        images = self.intake.admit(images, self.on.like)
        refusals = self.intake.refusals(images)
        kept = torch.tensor([reason is None for reason in refusals], device=images.device)
        if kept.any():
            rows = images if kept.all() else images[kept]
            answer, state = self._answer(rows, hurry)
            reasons = iter(answer.refusals)
            refusals = tuple(next(reasons) if why is None else why for why in refusals)
            answer = replace(answer, logits=scattered(answer.logits, kept), refusals=refusals)
        else:
            nothing = images.new_full((len(images), num_classes_of(self.on.model)), torch.nan)
            answer = Answer(nothing, refusals, Outcome.SKIPPED, "every image was refused")
            state = self.state
        self._now = (state, self.counts.plus(answer))
        return answer

    def source(self, images: Float[Tensor, "n channels h w"]) -> Float[Tensor, "n c"]:
        """Logits of the model as it was before any adaptation."""
        with torch.no_grad():
            return self.on(self.own, images)

    def reset(self) -> None:
        """Return to the state of the start; counts go on."""
        self._now = (self.initial, self.counts)

    def adapted(self) -> nn.Module:
        """A copy of the model with its parameters as they are adapted now, to be saved.

        What a method does beside them is not in it: statistics of a batch, prompts, a guard.

        Raises:
            ValueError: If the method adapts no parameters.
        """
        params = part(self.state, "method").get("params")
        if params is None:
            raise ValueError(f"{type(self.method).__name__} adapts no parameters of the model")
        copy = deepcopy(self.on.model)
        with torch.no_grad():
            for name, value in self.on.named(params).items():
                copy.get_parameter(name).copy_(value)
        return copy

    def state_dict(self) -> dict[str, Any]:
        """The state and the counts, to be saved as one."""
        return {"state": dict(self.state), "counts": asdict(self.counts)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: If it is of another method, or holds values that are not finite; nothing
                has changed then.
        """
        state, counts = saved.get("state", {}), saved.get("counts", {})
        require_tensors_like(state, self.initial)
        require_like(counts, asdict(Counts()), "counts")
        known = {key: counts[key] for key in asdict(Counts())}
        self._now = (at(self.on.like.device, state), Counts(**known))

    def _answer(self, images: Tensor, hurry: bool) -> tuple[Answer, State]:
        """The answer to rows that were taken in, and the state to go on with."""
        watch = part(self.state, "guard")
        if self.guard is not None and self.guard.pauses(watch):
            state = with_part(self.state, "guard", self.guard.resume(watch))
            step = Step(self.source(images), {}, num_forward=len(images))
            return _answer(step, Outcome.SKIPPED, "pause after a collapse"), state
        if hurry:
            step, outcome, reason = self._predict(images), Outcome.SKIPPED, "hurry"
        else:
            step, outcome, reason = self._attempt(images)
        state = with_part(self.state, "method", step.state)
        if outcome is Outcome.RESET:
            state = with_part(self.initial, "guard", watch)
        if self.guard is not None or not step.logits.isfinite().all():
            source = self.source(images)
            step = replace(step, num_forward=step.num_forward + len(images))
            logits, watch, collapse = self._compare(source, step.logits, watch)
            step = replace(step, logits=logits)
            state = with_part(state, "guard", watch)
            if collapse:
                state, outcome = with_part(self.initial, "guard", watch), Outcome.RESET
                reason = collapse
        return _answer(step, outcome, reason), state

    def _compare(self, source: Tensor, adapted: Tensor, watch: State) -> tuple[Tensor, State, str]:
        """Answers held against the original's; the guard's state; what shows a collapse."""
        if not adapted[source.isfinite().all(1)].isfinite().all():
            after = watch if self.guard is None else self.guard.after_collapse(watch)
            return source, after, "no finite answer where the original has one"
        valid = adapted.isfinite().all(1)
        if self.guard is None or not valid.any():
            return adapted, watch, ""
        verdict = self.guard.judge(watch, source[valid], adapted[valid])
        return scattered(verdict.logits, valid), verdict.state, verdict.collapse

    def _attempt(self, images: Tensor) -> tuple[Step, Outcome, str]:
        """One step; where it fails in any way, an answer by the state before it."""
        before = part(self.state, "method")
        key = np.random.SeedSequence((self.seed, self.counts.position)).generate_state(1)[0]
        generator = torch.Generator(images.device).manual_seed(int(key))
        try:
            step = self.method.step(self.on, before, images, generator)
            failure = first_not_finite({"logits": step.logits, **changed(before, step.state)})
        except Exception as error:  # whatever fails in a step, the stream must go on
            failure = f"{type(error).__name__}: {error}"
        else:
            if failure is None:
                if step.reset:
                    return step, Outcome.RESET, step.reset
                idle = Outcome.SKIPPED if self.method.adapts else Outcome.KEPT
                return step, Outcome.ADAPTED if step.num_selected else idle, ""
            failure = f"'{failure}' is not finite"
        return self._predict(images), Outcome.ROLLED_BACK, failure

    def _predict(self, images: Tensor) -> Step:
        """An answer by the present state."""
        state = part(self.state, "method")
        with torch.no_grad():
            logits = self.method.predict(self.on, state, images)
        return Step(logits, state, num_forward=len(images))


def _answer(step: Step, outcome: Outcome, reason: str) -> Answer:
    """The answer that a step amounts to; rows without finite logits are refused."""
    valid = step.logits.isfinite().all(1)
    return Answer(
        step.logits.masked_fill(~valid[:, None], torch.nan),
        tuple(None if ok else "unanswerable" for ok in valid.tolist()),
        outcome,
        reason,
        step.num_selected,
        step.num_forward,
        step.num_backward,
    )


def changed(before: State, after: State) -> State:
    """The tensors of a state that are not those of another."""
    return {name: value for name, value in after.items() if value is not before.get(name)}


def first_not_finite(tensors: State) -> str | None:
    """Name of the first tensor with a value that is NaN or infinite."""
    names = [name for name, value in tensors.items() if value.is_floating_point()]
    finite = [tensors[name].isfinite().all() for name in names]
    if finite and not torch.stack(finite).all():
        return next(name for name, ok in zip(names, finite, strict=True) if not ok)
    return None

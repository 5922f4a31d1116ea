"""Block reconstruction: stage by stage, a quantized model learns what its float one computes.

For each stage l, in order, with X^_l its input from the quantized stages before it and O_l its
output in the float model on float inputs:

    minimise  sum_i w_i L_i(B^_l(X^_l), O_l, ...)   over the trainable sets, by Adam

Losses and trainable sets are plugged in; MGRQ, DopQ-ViT's full form and TTAQ's calibration are
configurations of this one loop. Activation quantizers may be dropped at random, value by value
(QDrop, Wei et al., ICLR 2022, https://arxiv.org/abs/2203.05740).

Memory: besides the model and its float copy, the activations of one stage boundary for all images:
quantized inputs, float inputs and float outputs, `4 * 3 * images * tokens * dim` bytes, a third
more where images are perturbed; see `activation_bytes`. A ViT-Ti at 224 pixels keeps 0.45 MiB for
each image.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat.calibrate import Initialiser, joined, untouched_on_error
from qat.extras import require_compiler
from qat.journal import Journal, NoJournal
from qat.quantizers import Phase, set_phase
from qat.reconstruct.data import (
    StageData,
    dropped,
    linear_layers,
    tapped,
    token_importance,
    weights_of,
)
from qat.reconstruct.descent import descending, frozen
from qat.reconstruct.joint import JointTuning
from qat.reconstruct.stage import Stage
from qat.reconstruct.stages import stages
from qat.reconstruct.terms import Term
from qat.reconstruct.trainable import Trainable

EVALUATION_BATCH = 32

Perturbation = Callable[[Tensor, torch.Generator], Tensor]
"""From preprocessed images and a generator on the processor to perturbed ones."""


@dataclass(frozen=True)
class Reconstruction:
    """Settings of the loop.

    Attributes:
        terms: Terms of the loss, by name.
        weights: Weight of each term.
        train: What is trained.
        num_steps: Steps of Adam in each stage.
        batch_size: Images in each step.
        normalise: Multiply each weight by the ratio of the first term to its own at the first step
            of the stage, so that weights compare terms of different units.
        drop: Probability that a value of an activation passes unquantized while training.
        exact_inputs: Probability that a value of a stage's input is that of the float model while
            training. Without any, a stage learns to undo the noise of those before it, by heart
            where images are few.
        perturb: Makes the second view of every image that some terms compare, once for the run.
        seed: Seeds the choice of images and drops, anew in each stage.
    """

    terms: Mapping[str, Term]
    weights: Mapping[str, float]
    train: tuple[Trainable, ...]
    num_steps: int
    batch_size: int = 16
    normalise: bool = True
    drop: float = 0.0
    exact_inputs: float = 0.0
    perturb: Perturbation | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if set(self.terms) != set(self.weights):
            raise ValueError(f"terms {sorted(self.terms)} need weights, got {sorted(self.weights)}")
        if self.num_steps < 1 or self.batch_size < 1 or not 0 <= self.drop < 1:
            raise ValueError(
                "reconstruction needs num_steps and batch_size of at least 1 and drop in [0, 1), "
                f"got {self.num_steps}, {self.batch_size} and {self.drop}"
            )
        if not 0 <= self.exact_inputs <= 1:
            raise ValueError(f"exact_inputs must be in [0, 1], got {self.exact_inputs}")

    def __call__(
        self,
        model: nn.Module,
        images: Float[Tensor, "batch c h w"],
        journal: Journal | None = None,
        original: nn.Module | None = None,
        name: str = "",
    ) -> None:
        """Reconstruct a calibrated model, in place.

        Args:
            model: A converted model whose quantizers are in phase QUANTIZE.
            images: Calibration images, without labels.
            journal: Hears of the progress; one that remembers finished stages lets a run continue.
            original: The float model that sets the targets; None takes a copy of `model` as it is,
                in phase FLOAT.
            name: Precedes the names of the stages in the journal, for methods of several passes.

        Raises:
            ValueError: If the architecture is not known to `qat.reconstruct.stages`.
        """
        journal = journal or NoJournal()
        original = copy.deepcopy(model) if original is None else original
        set_phase(original, Phase.FLOAT)
        original.eval().requires_grad_(False)
        chain, goal = stages(model), stages(original)
        view = None
        if self.perturb is not None:
            view = self.perturb(images, torch.Generator().manual_seed(self.seed))
        journal.note("activation_bytes", activation_bytes(goal, images, view is not None))
        logits = _run(original, images)
        classes = torch.Generator().manual_seed(self.seed)
        importance = cache(lambda: token_importance(goal, images, classes, EVALUATION_BATCH))
        quantized = exact = images
        with frozen(model):
            for index, (stage, reference) in enumerate(zip(chain, goal, strict=True)):
                target = _run(reference.forward, exact)
                part = f"{name}{stage.name}"
                state = journal.finished(part)
                if state is None:
                    journal.begin(part, self.num_steps, len(chain) - index - 1)
                    rest = goal[index + 1 :]
                    weights = weights_of(stage, quantized, view)
                    data = StageData(
                        quantized=quantized,
                        view=view,
                        exact=exact,
                        target=target,
                        logits=logits,
                        rest=rest,
                        exact_inputs=self.exact_inputs,
                        weights=weights,
                        importance=lambda index=index: importance()[index],
                    )
                    generator = torch.Generator().manual_seed(self.seed * 1009 + index)
                    self._train(stage, reference, data, generator, partial(journal.step, part))
                    journal.finish(part, stage.state())
                else:
                    stage.restore(state)
                quantized, exact = _run(stage.forward, quantized), target
                view = None if view is None else _run(stage.forward, view)

    def _train(
        self,
        stage: Stage,
        reference: Stage,
        data: StageData,
        generator: torch.Generator,
        report: Callable[[int, dict[str, float]], None],
    ) -> None:
        """Train one stage."""
        scales: dict[str, float] = {}
        with (
            descending(self.train, stage.modules, self.num_steps) as descent,
            dropped(stage, self.drop, generator),
            tapped(self._watched(stage, reference)) as taps,
        ):
            if descent is None:
                return
            for number in range(self.num_steps):
                step = data.draw(self.batch_size, generator, stage, reference, taps)
                values = {name: term(step) for name, term in self.terms.items()}
                scales = scales or self._scales(values)
                loss = torch.stack([scales[k] * value for k, value in values.items()]).sum()
                loss = descent.step(loss)
                losses = {name: value.item() for name, value in values.items()}
                report(number, {**losses, "loss": loss.item()})

    def _watched(self, stage: Stage, reference: Stage) -> list[tuple[nn.Module, nn.Module]]:
        """The linear layers of both stages, if a term reads them."""
        if not any(term.needs_layers for term in self.terms.values()):
            return []
        return list(zip(linear_layers(stage), linear_layers(reference), strict=True))

    def _scales(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Factor of each term, fixed at the first step of a stage."""
        first = next(iter(values.values())).item()
        ratio = {
            k: first / max(v.item(), 1e-12) if self.normalise else 1.0 for k, v in values.items()
        }
        return {name: self.weights[name] * ratio[name] for name in values}


def start_and_reconstruct(
    model: nn.Module,
    batches: Iterable[Tensor],
    initialise: Initialiser,
    num_init: int,
    loop: Reconstruction,
    journal: Journal | None,
    joint: JointTuning | None = None,
) -> None:
    """Calibrate a converted model on the first images, then reconstruct it on all.

    Args:
        model: A converted model; as it was if anything raises.
        batches: Preprocessed images.
        initialise: Calibrates its quantizers.
        num_init: How many images that takes.
        loop: The reconstruction, towards the float model as it is now.
        journal: Hears of the progress.
        joint: Tunes all stages together at the end.
    """
    stages(model)  # refuses a model that it cannot divide, before any work
    images = joined(batches)
    if joint is not None and joint.compiled and images.device.type == "cpu":
        require_compiler("joint.compiled")
    original = copy.deepcopy(model)
    with untouched_on_error(model):
        initialise(model, [images[:num_init]])
        loop(model, images, journal, original)
        if joint is not None:
            joint(model, images, original, journal)


def activation_bytes(chain: list[Stage], images: Tensor, views: bool = False) -> int:
    """Bytes of the activations that are kept at the widest stage boundary, for all images.

    Args:
        chain: Stages.
        images: All images.
        views: Whether the inputs of perturbed images are kept too.
    """
    with torch.no_grad():
        x, widest = chain[0].forward(images[:1]), 0  # the images themselves are the caller's
        for stage in chain[1:]:
            y = stage.forward(x)
            widest = max(widest, (3 if views else 2) * x.numel() + y.numel())
            x = y
    return 4 * widest * len(images)


@torch.no_grad()
def _run(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([forward(part) for part in x.split(EVALUATION_BATCH)])

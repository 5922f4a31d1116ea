"""Forward-only adaptation of a vision transformer by prompts, in the manner of FOA.

Niu, Miao, Chen, Wu, Zhao. ICML 2024. https://arxiv.org/abs/2404.01650

    searched  `prompts` tokens behind the class token, by CMA-ES over `population` candidates a
              batch, of which one is the present mean
    fitness   sum of H(p) + `weight` n / 64 sum over blocks of the squared distance of mean and
              standard deviation of the class token from those on clean images
    answer    of the best candidate, the classifier's input shifted by the clean mean less a running
              mean of this stream's, which moves by 0.1

No gradient, so quantizers need none. Deviations: CMA-ES is the separable one; clean statistics come
from the calibration images. Provenance: the paper's text and the authors' code, commit 004b02d.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from qat.tta import cma
from qat.tta.answer import State, Step
from qat.tta.base import Method
from qat.tta.lame import classifier_input
from qat.tta.ops import entropy, moved
from qat.tta.overlay import Overlay
from qat.tta.parts import part, with_part

MOVE = 0.1
"""Share of a batch in the running mean of the classifier's input."""


@dataclass(frozen=True)
class FOA(Method):
    """Searches prompts that make predictions certain and features familiar.

    Attributes:
        population: Candidates, and forward passes, a batch.
        prompts: Tokens that are added.
        weight: Weight of the distance of the features.
        radius: Standard deviation of the first candidates.
    """

    population: int = 28
    prompts: int = 3
    weight: float = 0.4
    radius: float = 0.1

    def __post_init__(self) -> None:
        if self.population < 4:
            raise ValueError(f"population must be at least 4, got {self.population}")

    def start(self, on: Overlay, calibration: Iterable[Tensor]) -> State:
        """Prompts around zero, and the features of clean images.

        Raises:
            ValueError: If the model has no blocks and class token, or there are no images.
        """
        model: Any = on.model
        if getattr(model, "cls_token", None) is None or not hasattr(model, "blocks"):
            raise ValueError(
                f"qat.tta.FOA adds tokens to a ViT with a class token, not to a "
                f"{type(model).__name__}; use qat.tta.Norm or qat.tta.Tent"
            )
        batches = list(calibration)
        if not batches:
            raise ValueError("qat.tta.FOA needs calibration images, for the features of clean ones")
        images = torch.cat(batches)
        with torch.no_grad():
            _, tokens, feature = _run(on, None, images)
        clean = {"mean": tokens.mean(1), "deviation": tokens.std(1, correction=0)}
        state = with_part({}, "clean", {**clean, "feature": feature.mean(0)})
        search = cma.start(self.prompts * tokens.shape[2], self.radius, on.like.float())
        return {**with_part(state, "search", search), "feature": feature.mean(0)}

    def predict(self, on: Overlay, state: State, images: Tensor) -> Float[Tensor, "n c"]:
        """Answer of the mean of the search."""
        _, _, feature = _run(on, self._tokens(on, state["search.mean"]), images)
        return self._answer(on, state, feature)

    def step(self, on: Overlay, state: State, images: Tensor, generator: torch.Generator) -> Step:
        """One generation."""
        search = part(state, "search")
        draws = cma.sample(search, self.population, generator)
        draws[0] = 0  # the mean itself
        losses, features = [], []
        with torch.no_grad():
            for candidate in cma.candidates(search, draws):
                logits, tokens, feature = _run(on, self._tokens(on, candidate), images)
                losses.append(self._fitness(state, logits, tokens))
                features.append(feature)
            loss = torch.stack(losses)
            if not loss.isfinite().all():
                raise FloatingPointError("the fitness of a candidate is not finite")
            feature = features[int(loss.argmin())]
            state = {**state, "feature": moved(state["feature"], feature.mean(0), MOVE)}
            logits = self._answer(on, state, feature)
        n = len(images)
        state = with_part(state, "search", cma.update(search, draws, loss))
        return Step(logits, state, n, num_forward=n * self.population)

    def _fitness(self, state: State, logits: Tensor, tokens: Tensor) -> Tensor:
        gap = (tokens.mean(1) - state["clean.mean"]).square().sum()
        gap = gap + (tokens.std(1, correction=0) - state["clean.deviation"]).square().sum()
        return entropy(logits).sum() + self.weight * len(logits) / 64 * gap

    def _tokens(self, on: Overlay, flat: Tensor) -> Tensor:
        return rearrange(flat, "(k d) -> 1 k d", k=self.prompts).to(on.like.dtype)

    def _answer(self, on: Overlay, state: State, feature: Tensor) -> Tensor:
        model: Any = on.model
        shifted = feature + state["clean.feature"] - state["feature"]
        return model.get_classifier()(shifted.to(on.like.dtype)).float()


def _run(
    on: Overlay, prompts: Float[Tensor, "1 k d"] | None, images: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, C), class token after every block (L, N, D), input of the classifier (N, D)."""
    tokens: list[Tensor] = []
    feature: list[Tensor] = []

    def insert(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if prompts is None:
            return None
        x = inputs[0]
        added = repeat(prompts, "1 k d -> n k d", n=len(x))
        return (torch.cat((x[:, :1], added, x[:, 1:]), 1),)

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        tokens.append(output[:, 0])

    def hooks(model: Any) -> None:
        classifier_input(model, feature)
        model.blocks[0].register_forward_pre_hook(insert)
        for block in model.blocks:
            block.register_forward_hook(keep)

    logits = on(on.flat(), images, hooks)
    return logits, torch.stack(tokens), feature[0].float()

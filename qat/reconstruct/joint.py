"""Joint tuning: after block reconstruction, all stages train together towards the float model.

    minimise  lambda mean_l || N(O^_l) - N(O_l) ||^2 + KL( softmax(y) || softmax(y^) )

O^_l is the output of stage l on the quantized stages before it, O_l the float one on float inputs,
N the normalization of each token, y^ and y the logits. A stage can so mend what the stages before
it lose. Logits alone are learnt by heart from few images: the first term is what helps.

The float model runs beside the quantized one in each step, so nothing is kept for all images but
the images themselves.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from qat.journal import Journal, NoJournal
from qat.quantizers import Phase, set_phase
from qat.reconstruct.descent import descending, frozen
from qat.reconstruct.stage import Stage
from qat.reconstruct.stages import stages
from qat.reconstruct.terms import OutputError
from qat.reconstruct.trainable import Steps, Weights

PART = "joint"
"""The name of the pass in a journal."""


@dataclass(frozen=True)
class JointTuning:
    """Settings of the pass.

    Attributes:
        num_steps: Steps of Adam.
        batch_size: Images in each step.
        lr: Learning rate of weights, trained straight through their rounding.
        step_lr: Learning rate of activation steps, as a share of their size.
        output_weight: lambda.
        compiled: Compile the step and compute it under bfloat16 autocast: a ViT-Ti takes a minute
            more at the start and then two fifths of the time. Needs a C++ compiler.
        seed: Seeds the choice of images.
    """

    num_steps: int
    batch_size: int = 16
    lr: float = 5e-5
    step_lr: float = 2e-3
    output_weight: float = 100.0
    compiled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch_size < 1:
            raise ValueError(
                "joint tuning needs num_steps and batch_size of at least 1, "
                f"got {self.num_steps} and {self.batch_size}"
            )

    def __call__(
        self,
        model: nn.Module,
        images: Float[Tensor, "batch c h w"],
        original: nn.Module,
        journal: Journal | None = None,
    ) -> None:
        """Tune a calibrated model, in place.

        Args:
            model: A converted model whose quantizers are in phase QUANTIZE.
            images: Calibration images, without labels.
            original: The float model that sets the targets.
            journal: Hears of the progress; one that remembers the pass lets a run continue.
        """
        journal = journal or NoJournal()
        whole = Stage(PART, (model,), model)
        state = journal.finished(PART)
        if state is not None:
            whole.restore(state)
            return
        set_phase(original, Phase.FLOAT)
        original.eval().requires_grad_(False)
        journal.begin(PART, self.num_steps, 0)
        with frozen(model):
            self._train(stages(model), stages(original), images, journal)
        journal.finish(PART, whole.state())

    def _train(
        self, ours: list[Stage], theirs: list[Stage], images: Tensor, journal: Journal
    ) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        losses = torch.compile(_losses) if self.compiled else _losses
        modules = [module for stage in ours for module in stage.modules]
        train = (Weights(self.lr), Steps(self.step_lr))
        with descending(train, modules, self.num_steps) as descent:
            if descent is None:
                return
            for number in range(self.num_steps):
                chosen = torch.randint(len(images), (self.batch_size,), generator=generator)
                batch = images[chosen.to(images.device)]
                with torch.autocast(images.device.type, torch.bfloat16, enabled=self.compiled):
                    output, logits = losses(ours, theirs, batch)
                loss = descent.step(self.output_weight * output + logits)
                parts = {"output": output.item(), "logits": logits.item(), "loss": loss.item()}
                journal.step(PART, number, parts)


def _losses(ours: list[Stage], theirs: list[Stage], images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean error of the outputs before the logits, and divergence of the logits in nats."""
    x = y = images
    errors = []
    for stage, reference in zip(ours, theirs, strict=True):
        x = stage.forward(x)
        with torch.no_grad():
            y = reference.forward(y)
        errors.append((x.float(), y.float(), stage.channels))
    *outputs, (x, y, _) = errors
    divergence = F.kl_div(
        x.log_softmax(-1), y.log_softmax(-1), reduction="batchmean", log_target=True
    )
    return torch.stack([OutputError().between(*pair) for pair in outputs]).mean(), divergence

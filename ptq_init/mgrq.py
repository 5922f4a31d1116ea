"""MGRQ (reconstructed): post-training quantization with mixed-granularity reconstruction.

Yang, Li, Xiao, Gong, Gu. ICIP 2024. https://arxiv.org/abs/2406.09229

The abstract names four parts and gives no formula; no code is public. Our reading, stage by stage:

    OBWR  L_OB = mean || N(O^_l) - N(O_l) ||^2
    EBGS  L_EB = mean_n sum_t a_t || N(O^_l)_t - N(O_l)_t ||^2,   a_t ~ || d log p / d O_l,t ||^2
     or   L_EB = tau^2 KL( softmax(y / tau) || softmax(y^_l / tau) )
    IBLS  L_IB = mean_m mean_{n,t} KL( softmax(H_m / tau_m) || softmax(H^_m / tau_m) )
    L = L_OB + lambda_1 L_EB + lambda_2 L_IB,   lambda_i = c_i L_OB0 / L_i0

O^_l is the output of block l on the quantized prefix, O_l the float one on float inputs; a_t the
share of token t in what the float model's answer to image n depends on; y^_l the logits that the
remaining float blocks make of O^_l, y the float logits; H_m the output of layer m, with its
standard deviation tau_m, softmax over the channels; L_i0 a term at the first step of the block.

Both forms of EBGS tie a block's output to the model's. The second learns the logits of few images
by heart and loses accuracy on others, so the first is the default (docs/archive/log_2026-11.md).

With `joint`, all blocks are tuned together at the end (`qat.reconstruct.joint`). That is ours, not
the paper's; at three and four bits it gains most (docs/results.md).

N is the normalization of each token: with plain squared error the few tokens of huge norm decide
everything from the middle of the network on (docs/archive/log_2026-11.md). Start: RepQ-ViT, its
ranges searched with the same token-wise error. Provenance: **reconstruction** of OBWR, EBGS, IBLS
and their fusion; no number of ours reproduces one of the paper's, whose tables were not available.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq_init.repq_vit import RepQViT
from qat.journal import Journal
from qat.reconstruct import JointTuning, Reconstruction, Tuning, start_and_reconstruct
from qat.reconstruct.terms import OutputError, Step, Term, normalized


@dataclass(frozen=True)
class TokenSupervision:
    """EBGS by tokens: error of the output, each token by what the model's answer hangs on it."""

    needs_layers: ClassVar[bool] = False

    def __call__(self, step: Step) -> Tensor:
        """Mean over images; zero for logits, behind which there is no model."""
        importance = step.importance()
        if importance is None:
            return step.output.new_zeros(())
        ours, theirs = (normalized(x, step.channels) for x in (step.output, step.target))
        errors = (ours - theirs).square().mean(-1)
        return (importance * errors).flatten(1).sum(1).mean()


@dataclass(frozen=True)
class LogitSupervision:
    """EBGS by logits: divergence of those that the rest of the float model makes of the output.

    Attributes:
        temperature: Softens both distributions.
    """

    temperature: float = 1.0
    needs_layers: ClassVar[bool] = False

    def __call__(self, step: Step) -> Tensor:
        """Mean over the batch, in nats times the squared temperature."""
        ours, theirs = (
            (x / self.temperature).log_softmax(-1) for x in (step.output_logits, step.logits)
        )
        divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return divergence * self.temperature**2


@dataclass(frozen=True)
class LocalSupervision:
    """IBLS: divergence, over the channels, of the softened outputs of each linear layer."""

    needs_layers: ClassVar[bool] = True

    def __call__(self, step: Step) -> Tensor:
        """Mean over layers, images and tokens, in nats; zero for a stage without such layers."""
        divergences = [self._divergence(ours, theirs) for ours, theirs in step.layers]
        return torch.stack(divergences).mean() if divergences else step.output.new_zeros(())

    @staticmethod
    def _divergence(ours: Tensor, theirs: Tensor) -> Tensor:
        temperature = theirs.std().clamp(min=1e-6)
        ours, theirs = ((x / temperature).flatten(0, -2).log_softmax(-1) for x in (ours, theirs))
        return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class MGRQ:
    """The initialiser.

    Attributes:
        global_weight: c_1, of EBGS; 0 leaves it, and its cost, out.
        local_weight: c_2, of IBLS; 0 leaves it, and its cost, out.
        supervision: What EBGS compares, `tokens` by their importance or `logits`.
        normalise: Fuse the losses with the lambda above; otherwise with c_i alone.
        rounding: `ste` trains weights straight through rounding, `adaround` its direction.
        num_steps: Steps for each block.
        batch_size: Images a step.
        lr: Learning rate of weights, or of the rounding.
        step_lr: Learning rate of activation steps, as a share of their size.
        drop: Probability that an activation value passes unquantized in training (QDrop).
        exact_inputs: Probability that a value of a block's input is that of the float model.
        temperature: tau of EBGS by logits.
        num_init: Images, the first ones, on which quantizers are calibrated.
        per_token: Weight the error of each token by its inverse energy in the search of ranges.
        joint: Tunes all blocks together at the end; None leaves that out.
        seed: Seeds the choice of images.
    """

    global_weight: float = 0.5
    local_weight: float = 0.5
    supervision: Literal["tokens", "logits"] = "tokens"
    normalise: bool = True
    rounding: Literal["ste", "adaround"] = "ste"
    num_steps: int = 60
    batch_size: int = 16
    lr: float = 2e-4
    step_lr: float = 5e-3
    drop: float = 0.0
    temperature: float = 1.0
    exact_inputs: float = 0.5
    num_init: int = 32
    per_token: bool = True
    joint: JointTuning | None = None
    seed: int = 0

    def __call__(
        self, model: nn.Module, batches: Iterable[Tensor], journal: Journal | None = None
    ) -> None:
        """Initialise a converted model; quantizers on the first images, training on all."""
        start = RepQViT("paper", self.per_token)
        loop = self.reconstruction()
        start_and_reconstruct(model, batches, start, self.num_init, loop, journal, self.joint)

    def reconstruction(self) -> Reconstruction:
        """The engine with MGRQ's losses."""
        losses: dict[str, tuple[Term, float]] = {"block": (OutputError(), 1.0)}
        if self.global_weight:
            by_logits = self.supervision == "logits"
            form = LogitSupervision(self.temperature) if by_logits else TokenSupervision()
            losses["global"] = (form, self.global_weight)
        if self.local_weight:
            losses["local"] = (LocalSupervision(), self.local_weight)
        return Tuning.of(self).loop(losses, normalise=self.normalise)

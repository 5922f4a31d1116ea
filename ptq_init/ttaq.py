"""TTAQ (reconstructed), calibration: quantizers that bear perturbed inputs.

Xiao, Li, Yang, Mei, Gu. https://arxiv.org/abs/2412.09899

The abstract names three parts and gives no formula; no code is public. The two that act in
calibration, as terms of block reconstruction, stage by stage:

    L = d(z^(x), z(x)) + lambda_1 L_PEM + lambda_2 L_PCR,   lambda_i = c_i d_0 / L_i0

z^ is the output of a stage in the quantized model, z in the float one, d the error of the output,
and L_i0 a term at the first step of the stage. `ptq_init.ttaq_terms` holds the candidate forms of
L_PEM and L_PCR. The third part, ABL, works online: `qat.tta`.

Provenance: **reconstruction** of both parts. Certain is what they are for: a weight regularization
that mitigates input perturbations, and consistent predictions for the same sample. Forms and
weights were chosen on the four held-out corruptions, never on the benchmark's fifteen, by
`benchmarks/ttaq_forms.py` (docs/archive/log_2026-11.md, "Forms of PEM and PCR again"): PCR-3 helps
at three and two bits, PEM in no form.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq_init.repq_vit import RepQViT
from ptq_init.ttaq_terms import PCR, PEM
from qat.calibrate import Initialiser
from qat.journal import Journal
from qat.reconstruct import Reconstruction, Tuning, start_and_reconstruct
from qat.reconstruct.terms import OutputError, Term


@dataclass(frozen=True)
class WeakPerturbation:
    """Mild noise, blur, gain and offset, all at once and at random; no corruption of a benchmark.

    Attributes:
        noise: Largest deviation of normal noise, in units of the normalized pixels.
        blur: Largest share of a mean over 3 x 3 pixels.
        gain: Largest relative change of the distance to each channel's mean.
        offset: Largest shift of all pixels of an image.
    """

    noise: float = 0.2
    blur: float = 1.0
    gain: float = 0.3
    offset: float = 0.2

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Perturb images (N, C, H, W), each by amounts of its own."""

        def amounts(low: float, high: float) -> Tensor:
            drawn = torch.rand(len(images), 1, 1, 1, generator=generator)
            return (low + (high - low) * drawn).to(images)

        smooth = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        x = torch.lerp(images, smooth, amounts(0.0, self.blur))
        mean = x.mean((2, 3), keepdim=True)
        x = mean + (x - mean) * (1 + amounts(-self.gain, self.gain))
        noise = torch.randn(images.shape, generator=generator).to(images)
        return x + amounts(-self.offset, self.offset) + amounts(0.0, self.noise) * noise


@dataclass(frozen=True)
class TTAQ:
    """The initialiser.

    Attributes:
        pem: Form of PEM, `none` to leave it out.
        pem_weight: c_1: its share of the loss at the first step of a stage.
        pcr: Form of PCR, `none` to leave it out.
        pcr_weight: c_2: likewise, of each of its terms.
        start: Calibrates the quantizers; None takes RepQ-ViT, which a model without LayerNorms
            cannot: give it `ptq_init.percentile_mse.PercentileMSERange`.
        scope: Of the error of the output, see `OutputError`; `tensor` for convolutional networks.
        rounding: `ste` trains weights straight through rounding, `adaround` its direction.
        num_steps: Steps for each stage.
        batch_size: Images a step.
        lr: Learning rate of weights, or of the rounding.
        step_lr: Learning rate of activation steps, as a share of their size.
        drop: Probability that an activation value passes unquantized in training (QDrop).
        exact_inputs: Probability that a value of a stage's input is that of the float model.
        num_init: Images, the first ones, on which quantizers are calibrated.
        seed: Seeds the choice of images and their perturbation.
    """

    pem: Literal["none", "A", "A-relative", "B", "C", "D", "E"] = "A"
    pem_weight: float = 0.03
    pcr: Literal["none", "1", "2", "3", "1+3"] = "3"
    pcr_weight: float = 1.0
    start: Initialiser | None = None
    scope: Literal["token", "tensor"] = "token"
    rounding: Literal["ste", "adaround"] = "ste"
    num_steps: int = 60
    batch_size: int = 16
    lr: float = 2e-4
    step_lr: float = 5e-3
    drop: float = 0.0
    exact_inputs: float = 0.5
    num_init: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pcr == "2" and not self.drop:
            raise ValueError("PCR-2 compares random drops: set drop, to 0.5 for example")

    def __call__(
        self, model: nn.Module, batches: Iterable[Tensor], journal: Journal | None = None
    ) -> None:
        """Initialise a converted model; quantizers on the first images, training on all."""
        start = self.start or RepQViT("paper", per_token=True)
        loop = self.reconstruction()
        start_and_reconstruct(model, batches, start, self.num_init, loop, journal)

    def reconstruction(self) -> Reconstruction:
        """The engine with TTAQ's losses."""
        error = OutputError(self.scope)
        losses: dict[str, tuple[Term, float]] = {"block": (error, 1.0)}
        if self.pem != "none":
            losses["pem"] = (PEM[self.pem](error), self.pem_weight)
        if self.pcr != "none":
            for number, form in enumerate(PCR[self.pcr]):
                losses[f"pcr{number}"] = (form(error), self.pcr_weight)
        return Tuning.of(self).loop(losses, perturb=WeakPerturbation())

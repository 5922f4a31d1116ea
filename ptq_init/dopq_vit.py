"""DopQ-ViT (reconstructed): TanQ for attention maps, MOSF for the common scale, and block training.

Yang, Gong, Lin, Wu, Sun, Gu. https://arxiv.org/abs/2408.03291

MOSF, by the authors' own words the median as the optimal scaling factor, guided by the mean
absolute deviation: the common scale of RepQ-ViT's reparametrization is

    s~ = argmin_t (1/D) sum_d |s_d - t| = median(s),    z~ = round(median(z))

TanQ is the attention quantizer `qat.quantizers.TanQ`; the recipe puts it in place.

What is certain is the two ideas, and that the published numbers come with optimization. Provenance
of everything else: **reconstruction**. `DopQCalibration` is the two ideas on RepQ-ViT without
training. There MOSF cannot matter but through z~: for a fixed z~ every s~ gives the same quantized
model, since W~ scales with it (tests/ptq_init/test_repq_vit.py). `DopQViT` trains as I&S-ViT does,
which circumstantial evidence names as its base: activations first, with channel-wise scales and
float weights; then reparametrization; then weights too. It has fewer steps, larger learning rates,
learned activation steps and the token-wise error here, so as to take minutes on a laptop.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from ptq_init.repq_vit import calibrate_channels, reparametrize_norms
from qat.calibrate import joined, untouched_on_error
from qat.journal import Journal
from qat.quantizers import PercentileMSE, Phase, quantizers
from qat.reconstruct import Reconstruction
from qat.reconstruct.terms import OutputError
from qat.reconstruct.trainable import Steps, Weights
from qat.spec import Operand


def median_grid(scales: Tensor, zero_points: Tensor) -> tuple[Tensor, Tensor]:
    """MOSF: median scale and rounded median zero point."""
    return scales.median(), zero_points.median().round()


@dataclass(frozen=True)
class DopQCalibration:
    """Calibration only: RepQ-ViT with MOSF, on a model whose attention quantizers are TanQ.

    Attributes:
        per_token: Weight the error of each token by its inverse energy in the search of ranges.
    """

    per_token: bool = False

    def __call__(
        self, model: nn.Module, batches: Iterable[Tensor], journal: Journal | None = None
    ) -> None:
        """Initialise a converted model; all batches count as one."""
        images = joined(batches)
        observer = partial(PercentileMSE, per_token=self.per_token)
        with untouched_on_error(model):
            pairs = calibrate_channels(model, images, observer)
            reparametrize_norms(model, images, pairs, median_grid, observer)


@dataclass(frozen=True)
class DopQViT:
    """Calibration, then three stages of optimization.

    Attributes:
        num_steps: Steps for each block, in the first and again in the third stage.
        batch_size: Images a step.
        lr: Learning rate of the weights.
        step_lr: Learning rate of activation steps, as a share of their size.
        exact_inputs: Probability that a value of a block's input in the third stage is that of the
            float model; in the first stage all are.
        num_init: Images, the first ones, on which quantizers are calibrated.
        per_token: Weight the error of each token by its inverse energy in the search of ranges.
    """

    num_steps: int = 60
    batch_size: int = 16
    lr: float = 2e-4
    step_lr: float = 5e-3
    exact_inputs: float = 0.5
    num_init: int = 32
    per_token: bool = True

    def __call__(
        self, model: nn.Module, batches: Iterable[Tensor], journal: Journal | None = None
    ) -> None:
        """Initialise a converted model; quantizers on the first images, training on all."""
        images = joined(batches)
        first = images[: self.num_init]
        observer = partial(PercentileMSE, per_token=self.per_token)
        original = copy.deepcopy(model)
        train = Reconstruction(
            terms={"block": OutputError()},
            weights={"block": 1.0},
            train=(Weights(self.lr, norms=False), Steps(self.step_lr)),
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            exact_inputs=1.0,
        )
        with untouched_on_error(model):
            pairs = calibrate_channels(model, first, observer)
            for _, quantizer in quantizers(model):
                if quantizer.operand is Operand.WEIGHT:
                    quantizer.phase = Phase.FLOAT
            train(model, images, journal, original, name="activations ")
            # Calibrates weights again.
            reparametrize_norms(model, first, pairs, median_grid, observer)
            third = replace(train, exact_inputs=self.exact_inputs)
            third(model, images, journal, original, name="weights ")

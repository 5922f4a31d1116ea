"""The doctor: watches a quantized training and says what ails it, once, with what to try."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from qat.lightning.callbacks import OscillationTracker
from qat.lightning.instruments import (
    average_of,
    first_not_finite,
    loss_of,
    model_of,
    weights_of,
)
from qat.quantizers import LSQ, Affine, Phase, quantizers
from qat.train import doctor
from qat.train.doctor import Diagnosis

EVERY = 50
"""Steps between two looks at a thing: scales, clipped values, or the average of weights."""


class Doctor(Callback):
    """Tells the faults of `qat.train.doctor`, each once in a run.

    Scales are looked at every 50 steps, clipped values in the first batch of a validation, losses,
    flips and averages at the end of an epoch, and where the loss is not finite the batch is run
    again. What takes long, clipped values and averages, is left out within 50 steps of the last
    look, unless training ends.

    Args:
        strict: End the run at the first fault.
        tell: Is told each diagnosis.
    """

    def __init__(
        self, strict: bool = False, tell: Callable[[Diagnosis], Any] = rank_zero_info
    ) -> None:
        self.strict, self.tell = strict, tell
        self.found: list[dict[str, str]] = []
        self.losses: list[float] = []
        self.rates: list[float] = []
        self._starts: dict[str, Tensor] = {}
        self._batch: Any = None
        self._total, self._steps, self._rate = torch.zeros(()), 0, 0.0
        self._clipped: dict[str, tuple[int, float]] = {}
        self._looking = ExitStack()
        self._looked: dict[str, int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where scales start, and look at the optimizer."""
        scales = _scales(pl_module)
        self._starts = {name: scale.detach().clone() for name, scale in scales.items()}
        self._total = torch.zeros((), device=pl_module.device)
        decays = {
            id(parameter): group.get("weight_decay", 0.0)
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        known = {name: decays.get(id(scale), 0.0) for name, scale in scales.items()}
        self._report(trainer, doctor.decay_of_scales(known))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch, in case its loss is not finite; note the learning rate."""
        self._batch = batch
        self._rate += trainer.optimizers[0].param_groups[0]["lr"]

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Look for the layer in which a loss that is not finite begins.

        The run is ended by the module, `strict` or not.
        """
        if loss.isfinite():
            return
        layer, begins_here = first_not_finite(pl_module, self._batch)
        precision = str(trainer.precision)
        self._say(doctor.not_finite(trainer.global_step, layer, begins_here, precision))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the loss; look at the scales now and then."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._total += loss.detach()
            self._steps += 1
        if self._steps % EVERY == 0:
            self._look_at_scales(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at scales, at losses and flips so far, and at an average of weights."""
        self._look_at_scales(trainer, pl_module)
        self.losses.append(float(self._total) / max(1, self._steps))
        self.rates.append(self._rate / max(1, self._steps))
        self._total.zero_()
        self._steps, self._rate = 0, 0.0
        if any(quantizer.spec.bits == 1 for _, quantizer in quantizers(model_of(pl_module))):
            self._report(trainer, doctor.plateau(self.losses, trainer.global_step, _lr(trainer)))
            strength = getattr(getattr(pl_module, "regularizer", None), "strength", 0.0)
            trackers = [c for c in trainer.callbacks if isinstance(c, OscillationTracker)]  # type: ignore[attr-defined]
            for tracker in trackers:
                flips = doctor.frozen_signs(tracker.flip_rates, self.rates, strength)
                self._report(trainer, flips)
        second_half = 2 * trainer.global_step >= trainer.estimated_stepping_batches
        if second_half and self._is_due("average", trainer):
            self._report(trainer, self._of_average(trainer, pl_module))

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Listen to the operands of the first batch."""
        if batch_idx or dataloader_idx or not self._is_due("clipped", trainer):
            return
        for name, quantizer in quantizers(model_of(pl_module)):
            if isinstance(quantizer, Affine | LSQ) and quantizer.phase is Phase.QUANTIZE:
                handle = quantizer.register_forward_pre_hook(partial(self._listen, name))
                self._looking.callback(handle.remove)
        if getattr(pl_module, "compiles", False):  # a compiled model hears of no hooks
            self._looking.enter_context(torch.compiler.set_stance("force_eager"))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Judge what was clipped."""
        self._looking.close()
        clipped, self._clipped = self._clipped, {}
        if clipped:
            self._look_at_scales(trainer, pl_module)
            lr = None if trainer.sanity_checking else _lr(trainer)
            self._report(trainer, doctor.saturation(clipped, lr))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave nothing on the model where a batch failed."""
        self._looking.close()
        self._clipped = {}

    def state_dict(self) -> dict[str, Any]:
        """What was said and seen, so that a resumed run does not repeat it."""
        return {"found": self.found, "losses": self.losses, "rates": self.rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    def _is_due(self, what: str, trainer: Trainer) -> bool:
        step, last = trainer.global_step, self._looked.get(what, -EVERY)
        due = step - last >= EVERY or step >= trainer.estimated_stepping_batches
        if due:
            self._looked[what] = step
        return due

    def _look_at_scales(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scales = {n: s.detach() for n, s in _scales(pl_module).items() if n in self._starts}
        self._report(trainer, doctor.signs_of_scales(scales, self._starts, _lr(trainer)))

    def _of_average(self, trainer: Trainer, pl_module: LightningModule) -> Diagnosis | None:
        average = average_of(trainer)
        if average is None:
            return None
        trained = loss_of(pl_module, self._batch)
        with weights_of(average, pl_module):
            return doctor.averaging(trained, loss_of(pl_module, self._batch))

    def _listen(self, name: str, quantizer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(quantizer, Affine | LSQ)
        share = doctor.clipped_share(quantizer, inputs[0])
        self._clipped[name] = (quantizer.spec.bits, share)

    def _report(self, trainer: Trainer, diagnosis: Diagnosis | None) -> None:
        """Say a diagnosis of the first process, which ends all of them where that is asked for."""
        diagnosis = trainer.strategy.broadcast(diagnosis)
        if diagnosis is None or not self._say(diagnosis) or not self.strict:
            return
        raise ValueError(f"{diagnosis}; or leave doctor.strict out to go on all the same")

    def _say(self, diagnosis: Diagnosis) -> bool:
        """Tell a diagnosis, if it is the first of its fault."""
        if any(row["fault"] == diagnosis.fault for row in self.found):
            return False
        self.found.append(diagnosis.items())
        self.tell(diagnosis)
        return True


def _scales(module: LightningModule) -> dict[str, nn.Parameter]:
    """Trained scales, by name of the quantizer."""
    found = {name: getattr(q, "scale", None) for name, q in quantizers(model_of(module))}
    return {n: s for n, s in found.items() if isinstance(s, nn.Parameter) and s.requires_grad}


def _lr(trainer: Trainer) -> float:
    """The learning rate that the recipe says, whatever the schedule has made of it."""
    group = trainer.optimizers[0].param_groups[0]
    return group.get("initial_lr", group["lr"])

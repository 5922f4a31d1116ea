"""Callbacks: oscillation of quantized weights, use of binary activations, orderly interrupts."""

import signal
import threading
from contextlib import ExitStack
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from qat.layers import quantized_weights
from qat.lightning.instruments import model_of
from qat.quantizers import Phase, Quantizer, quantizers
from qat.train.oscillation import Oscillation, imbalance, positive_share, sign_statistics

SHARES = ("flip_rate", "oscillating", "near_boundary", "changed")
USES = ("sign_entropy", "dead_channels")
BALANCE = ("positive_before", "imbalance_before", "positive_after", "imbalance_after")
"""Columns of the table of signs, before and after the shift of a binary activation."""


class OscillationTracker(Callback):
    """Logs, each epoch, how weights change their codes and how binary activations use theirs.

    Logged, over all quantized weights, each weight counted once:

    - `weights/flip_rate`: share of the codes that change in a step, mean over the epoch
    - `weights/oscillating`: share whose oscillation frequency exceeds 0.005
    - `weights/near_boundary`: share within 0.1 steps (binary: 0.1 alpha) of the boundary
    - `weights/changed`: share whose code differs from the start of training (net changes)
    - `activations/sign_entropy`, `activations/dead_channels`: of binary activations, in validation

    Args:
        momentum: Of the oscillation frequency.
        warmup: Share of training before which flips do not count as oscillations.
    """

    measures = (*(f"weights/{key}" for key in SHARES), *(f"activations/{key}" for key in USES))

    def __init__(self, momentum: float = 0.01, warmup: float = 0.1) -> None:
        self.momentum = momentum
        self.warmup = warmup
        self.weights: dict[str, Oscillation] = {}
        self.last: dict[str, float] = {}
        self.layers: list[dict[str, Any]] = []
        self.signs: list[dict[str, Any]] = []
        self.flip_rates: list[float] = []
        self.step = 0
        self._entropy: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._balance: dict[str, list[Tensor]] = {}
        self._listening = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the codes at the start of training, unless a resumed run brought them."""
        if not self.weights:
            for name, weight, quantizer in quantized_weights(model_of(pl_module)):
                codes = quantizer.codes(weight).values
                self.weights[name] = Oscillation(codes, self.momentum)
        for seen in self.weights.values():
            seen.to(pl_module.device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """See the codes after the step before.

        Now and not right after it, since an interrupt may fall between a step and what follows.
        """
        self._see_step(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch."""
        self._see_step(trainer, pl_module)
        self.layers = []
        totals = torch.zeros(5, dtype=torch.float64)
        for name, weight, quantizer in quantized_weights(model_of(pl_module)):
            seen = self.weights[name]
            flips, chances = seen.take_flips()
            near = quantizer.boundary_distance(weight) < 0.1
            size = weight.numel()
            shares = [
                flips / max(1, chances),
                *(float(t.float().mean()) for t in (seen.oscillating(), near, seen.changed())),
            ]
            self.layers.append({"layer": name, **dict(zip(SHARES, shares, strict=True))})
            totals += torch.tensor([*(share * size for share in shares), size])
        if not self.layers:
            return
        for key, total in zip(SHARES, totals[:4] / totals[4], strict=True):
            self.last[key] = float(total)
            shown = key == "flip_rate"
            pl_module.log(f"weights/{key}", self.last[key], prog_bar=shown, sync_dist=True)
        self.flip_rates.append(self.last["flip_rate"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to binary activations."""
        for name, quantizer in quantizers(model_of(pl_module)):
            if _is_binary_activation(quantizer) and quantizer.phase is Phase.QUANTIZE:
                self._entropy[name], self._balance[name] = [], []
                handle = quantizer.register_forward_hook(self._listen(name))
                self._listening.callback(handle.remove)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the use of binary activations, mean over their quantizers."""
        self._listening.close()
        self.signs = [
            {"layer": name} | dict(zip(BALANCE, _mean(seen), strict=True))
            for name, seen in self._balance.items()
            if seen
        ]
        self._balance.clear()
        pairs = [pair for group in self._entropy.values() for pair in group]
        self._entropy.clear()
        if pairs:
            entropy, dead = (torch.stack(column).mean() for column in zip(*pairs, strict=True))
            self.last["sign_entropy"], self.last["dead_channels"] = float(entropy), float(dead)
            pl_module.log("activations/sign_entropy", entropy, sync_dist=True)
            pl_module.log("activations/dead_channels", dead, sync_dist=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave nothing on the model where a batch failed."""
        self._listening.close()
        self._entropy.clear()
        self._balance.clear()

    def summary(self) -> dict[str, Any]:
        """What `metrics.json` keeps: last values, flip rates over training, and every layer.

        `flip_rate` is the mean over all epochs, `flip_rate_late` that over the ninth tenth of
        them: in the very last one a decayed learning rate stops all flips.
        """
        if not self.flip_rates:
            return {}
        count = len(self.flip_rates)
        late = self.flip_rates[int(0.8 * count) : max(int(0.9 * count), int(0.8 * count) + 1)]
        rates = {
            "flip_rate": sum(self.flip_rates) / count,
            "flip_rate_late": sum(late) / len(late),
        }
        return {**self.last, **rates, "layers": self.layers}

    def state_dict(self) -> dict[str, Any]:
        """Codes, frequencies and flip rates, so that a resumed run continues them."""
        weights = {name: seen.state_dict() for name, seen in self.weights.items()}
        return {
            "weights": weights,
            "step": self.step,
            "flip_rates": self.flip_rates,
            "last": self.last,
            "layers": self.layers,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore codes and frequencies."""
        for name in ("step", "flip_rates", "last", "layers"):
            setattr(self, name, state_dict[name])
        for name, state in state_dict["weights"].items():
            self.weights[name] = Oscillation.from_state(state)

    def _see_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.step == trainer.global_step:
            return
        self.step = trainer.global_step
        warm = self.step <= self.warmup * float(trainer.estimated_stepping_batches)
        for name, weight, quantizer in quantized_weights(model_of(pl_module)):
            self.weights[name].update(quantizer.codes(weight).values, count_oscillations=not warm)

    def _listen(self, name: str) -> Any:
        def hook(quantizer: Quantizer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._entropy[name].append(sign_statistics(output.detach(), quantizer.shape))
            sides = (positive_share(x.detach(), quantizer.shape) for x in (inputs[0], output))
            self._balance[name].append(
                torch.stack([f for p in sides for f in (p.mean(), imbalance(p))])
            )

        return hook


class OrderlyInterrupt(Callback):
    """Lets Ctrl-C end training between two steps, where a checkpoint is exact.

    An interrupt in the middle of a step may leave weights that have moved and counters that have
    not. During validation it waits for the next step. A second Ctrl-C ends the run at once.
    Distributed runs keep Lightning's own handling.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signal."""
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the run if that was asked for."""
        if self.asked:
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signal back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _mean(rows: list[Tensor]) -> list[float]:
    return [round(value, 6) for value in torch.stack(rows).mean(0).tolist()]


def _is_binary_activation(quantizer: Quantizer) -> bool:
    return quantizer.spec.bits == 1 and quantizer.operand not in ("weight", "attention")

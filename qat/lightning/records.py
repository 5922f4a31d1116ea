"""Tables that a training run leaves for its report."""

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only

from qat import disk
from qat.layers import quantized_weights
from qat.lightning.callbacks import OscillationTracker
from qat.lightning.instruments import model_of
from qat.train.histogram import centres, histogram

Row = dict[str, Any]


class Records(Callback):
    """Writes three tables into a folder, anew whenever an epoch has ended.

    - `weights.csv`: share of all quantized weights in each bin of w / mean|w|, by epoch
    - `oscillation.csv`: what `OscillationTracker` says of every layer, by epoch
    - `signs.csv`: share of positive activations of every binary operand and their imbalance over
      channels, before and after its shift, in the newest validation

    Args:
        folder: Where they go.
        tracker: Watches the weights and the activations; it comes before this callback.
    """

    def __init__(self, folder: Path, tracker: OscillationTracker) -> None:
        self.folder, self.tracker = folder, tracker
        self.weights: list[Row] = []
        self.oscillation: list[Row] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the weights at the start, unless a resumed run brought them."""
        if not self.weights:
            self._see_weights(0, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch to the tables."""
        epoch = trainer.current_epoch + 1
        self._see_weights(epoch, pl_module)
        self.oscillation += [{"epoch": epoch, **row} for row in self.tracker.layers]
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """The tables, so that a resumed run continues them."""
        return {"weights": self.weights, "oscillation": self.oscillation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the tables."""
        self.weights, self.oscillation = state_dict["weights"], state_dict["oscillation"]

    def _see_weights(self, epoch: int, module: LightningModule) -> None:
        weights = [weight for _, weight, _ in quantized_weights(model_of(module))]
        if weights:
            counts = torch.stack([histogram(weight) for weight in weights]).sum(0)
            shares = (counts / sum(weight.numel() for weight in weights)).tolist()
            bins = (f"{centre:.2f}" for centre in centres().tolist())
            row = {name: round(share, 6) for name, share in zip(bins, shares, strict=True)}
            self.weights.append({"epoch": epoch, **row})

    @rank_zero_only
    def _write(self) -> None:
        tables = {
            "weights": self.weights,
            "oscillation": self.oscillation,
            "signs": self.tracker.signs,
        }
        for name, rows in tables.items():
            if rows:
                disk.write(self.folder / f"{name}.csv", disk.csv_of(rows))

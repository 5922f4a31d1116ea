"""Binarize a model of scikit-learn's digits, and watch how often its weights change sign."""

from functools import partial

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import qat
from binaryvit import BinaryQuantizers
from binaryvit.asm import StandardizedShift
from binaryvit.convert import react_
from binaryvit.grs import GRS, DistancePull
from qat.lightning.callbacks import OscillationTracker
from qat.lightning.modules import Distillation


class Watch(pl.Callback):
    """Prints the share of weights that flip in a step, and of those that swing to and fro."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One line an epoch."""
        seen = trainer.callback_metrics
        flips, swinging = seen["weights/flip_rate"], seen["weights/oscillating"]
        print(f"epoch {trainer.current_epoch}: flip rate {flips:.4f}, oscillating {swinging:.4f}")


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
labels = torch.tensor(digits.target)
train = DataLoader(TensorDataset(images[:1400], labels[:1400]), 64, shuffle=True)
val = DataLoader(TensorDataset(images[1400:], labels[1400:]), 64)

model = qat.timm_model(
    "vit_tiny_patch16_224",
    img_size=8,
    in_chans=1,
    num_classes=10,
    model_args={"patch_size": 4, "embed_dim": 96, "depth": 3, "num_heads": 3},
)
bit = {name: {"bits": 1} for name in ("weight", "input", "query", "key", "value")}
bit["attention"] = {"bits": 1, "signed": False}
rest = {"pattern": "*", "reason": "first layer and classifier stay in float"}
module = Distillation(
    model,
    plan=[{"pattern": "blocks.*", **bit}, rest],
    quantizer=BinaryQuantizers(shift=StandardizedShift),
    convert=react_,
    regularizer=GRS(DistancePull(), strength=0.1),
    optimizer=partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.0),
)
callbacks = [OscillationTracker(), Watch()]  # the tracker first: it logs what the other prints
trainer = pl.Trainer(
    max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks
)
trainer.fit(module, train, val)

"""What the doctor costs a training on four bits.

    python benchmarks/doctor.py

One thread, processor time from the first step to the last, validation included. The time inside of
the doctor's hooks is taken in the same run, so that other load on the machine meets both. A ratio
is all time over the time without the hooks: the median over runs, with the smallest and largest
beside it. Images are noise. Epochs are short and weights are averaged, so that every look of the
doctor takes place, and often.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

import qat
from qat.lightning.doctor import Doctor
from qat.lightning.modules import Distillation

DIGITS: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "img_size": 8,
    "in_chans": 1,
    "model_args": {"patch_size": 4, "embed_dim": 96, "depth": 3, "num_heads": 3},
}
DEIT: dict[str, Any] = {"name": "deit_tiny_patch16_224", "model_args": {"depth": 2}}
TRAININGS = (("ViT on digits", DIGITS, 64, 23, 6), ("DeiT-Ti, two blocks", DEIT, 8, 23, 6))
"""Title, model, batch size, steps of an epoch, and epochs."""


class Clock(pl.Callback):
    """Processor seconds of a training, and of the hooks of a doctor in it."""

    def __init__(self, doctor: Doctor) -> None:
        self.seconds = self.inside = 0.0
        for name in (*(name for name in vars(Doctor) if name.startswith("on_")), "_listen"):
            setattr(doctor, name, self._timed(getattr(doctor, name)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin."""
        self.seconds = -time.process_time()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End."""
        self.seconds += time.process_time()

    def _timed(self, hook: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any) -> None:
            start = time.process_time()
            hook(*arguments)
            self.inside += time.process_time() - start

        return timed


def ratio(size: dict[str, Any], batch: int, steps: int, epochs: int) -> tuple[float, float]:
    """Seconds of a step without the doctor, and how many times as long it takes with it."""
    model = qat.timm_model(num_classes=10, **size)
    shape = (size.get("in_chans", 3), *[size.get("img_size", 224)] * 2)

    def loader(count: int) -> DataLoader:
        labels = torch.randint(10, (count * batch,))
        return DataLoader(TensorDataset(torch.randn(count * batch, *shape), labels), batch)

    optimizer = partial(torch.optim.AdamW, lr=1e-4)
    module = Distillation(model, plan="w4a4", optimizer=optimizer)
    doctor = Doctor(tell=lambda _: None)
    clock = Clock(doctor)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, EMAWeightAveraging(decay=0.9), doctor],
    )
    trainer.fit(module, loader(steps), loader(5))
    alone = clock.seconds - clock.inside
    return alone / steps / epochs, clock.seconds / alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    table = Table("model", "epochs", "step, ms", "with the doctor, x")
    for name, size, *length in TRAININGS:
        steps, ratios = zip(*(ratio(size, *length) for _ in range(arguments.runs)), strict=True)
        cells = [f"{length[2]} of {length[1]} steps", f"{1e3 * statistics.median(steps):,.1f}"]
        spread = f"[{min(ratios):.4f}, {max(ratios):.4f}]"
        table.add_row(name, *cells, f"{statistics.median(ratios):.4f} {spread}")
    Console().print(f"torch {torch.__version__}, {vars(arguments)}", table)


if __name__ == "__main__":
    main()

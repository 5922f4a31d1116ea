"""Tables that training leaves for a report."""

import csv
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from binaryvit import BinaryQuantizers
from binaryvit.asm import StaticShift
from qat import Operand, QuantSpec
from qat.layers import QuantLinear
from qat.lightning.callbacks import OscillationTracker
from qat.lightning.records import Records
from qat.quantizers import quantizers, set_phase
from qat.quantizers.base import Phase
from qat.spec import Granularity
from qat.train.histogram import BINS, REACH, centres, histogram
from qat.train.oscillation import imbalance, positive_share


def test_histogram_is_in_units_of_the_mean_magnitude_of_each_row() -> None:
    """Rows of one magnitude, however large, lie at -1 and +1; what is beyond is in no bin."""
    weight = torch.tensor([[1.0, -1.0, 1.0], [100.0, -100.0, -100.0]])
    found = dict(zip(centres().tolist(), histogram(weight).tolist(), strict=True))
    near = {value: sum(n for at, n in found.items() if abs(at - value) < 0.1) for value in (-1, 1)}
    assert near == {-1: 3, 1: 3} and sum(found.values()) == 6
    assert histogram(torch.tensor([[0.0, 0.0, 0.0, 0.0, 5.0]])).sum() == 4
    assert histogram(torch.zeros(1, 4))[BINS // 2] == 4
    assert centres()[0] > -REACH


def test_imbalance_is_0_for_equal_signs_and_1_for_one_sign() -> None:
    x = torch.tensor([[-1.0, 2.0], [3.0, 4.0]])  # channels: one positive of two; both
    assert positive_share(x, (2,)).tolist() == [0.5, 1.0]
    assert imbalance(torch.tensor([0.5, 0.5])) == 0
    assert imbalance(torch.tensor([0.0, 1.0])) == 1


class Toy(LightningModule):
    """A binary linear layer, whose input is positive and whose shift moves it to half and half."""

    def __init__(self) -> None:
        super().__init__()
        linear, spec = nn.Linear(4, 2), QuantSpec(bits=1, granularity=Granularity.PER_CHANNEL)
        make = BinaryQuantizers(shift=StaticShift)
        weight = make(spec, (2, 4), Operand.WEIGHT)
        signs = make(QuantSpec(bits=1), (4,), Operand.INPUT)
        self.model = nn.Sequential(QuantLinear(linear, weight, signs))
        set_phase(self.model, Phase.QUANTIZE)
        with torch.no_grad():
            signs.shift.shift.fill_(0.5)  # type: ignore[union-attr]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(batch).square().sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.model(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _fit(folder: Path, max_epochs: int, **settings: Any) -> Trainer:
    tracker = OscillationTracker()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, max_epochs=max_epochs, enable_checkpointing=False,
        callbacks=[tracker, Records(folder, tracker)],
    )  # fmt: skip
    images = torch.tensor([[0.2, 0.4, 0.6, 0.8], [0.8, 0.6, 0.4, 0.2]])
    loaders = [DataLoader(list(images), batch_size=2) for _ in range(2)]
    trainer.fit(Toy(), *loaders, weights_only=True, **settings)
    return trainer


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_training_leaves_three_tables(tmp_path: Path) -> None:
    """Weights at the start and after each epoch, oscillation by epoch, signs of the newest one."""
    _fit(tmp_path, 2)
    weights = _rows(tmp_path / "weights.csv")
    assert [row["epoch"] for row in weights] == ["0", "1", "2"]
    assert all(abs(sum(map(float, list(row.values())[1:])) - 1) < 1e-4 for row in weights)
    oscillation = _rows(tmp_path / "oscillation.csv")
    assert [(row["epoch"], row["layer"]) for row in oscillation] == [("1", "0"), ("2", "0")]
    (signs,) = _rows(tmp_path / "signs.csv")
    assert float(signs["positive_before"]) == 1 and float(signs["imbalance_before"]) == 1
    assert float(signs["positive_after"]) == 0.5 and float(signs["imbalance_after"]) == 0


def test_resumed_training_continues_the_tables(tmp_path: Path) -> None:
    trainer = _fit(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "weights.csv").unlink()
    _fit(tmp_path, 3, ckpt_path=tmp_path / "last.ckpt")
    assert [row["epoch"] for row in _rows(tmp_path / "weights.csv")] == ["0", "1", "2", "3"]
    assert [row["epoch"] for row in _rows(tmp_path / "oscillation.csv")] == ["1", "2", "3"]


def test_float_model_leaves_no_tables(tmp_path: Path) -> None:
    tracker = OscillationTracker()
    records = Records(tmp_path, tracker)
    module = Toy()
    module.model = nn.Sequential(nn.Linear(4, 2))
    assert not list(quantizers(module.model))
    records.on_train_start(Trainer(logger=False, enable_checkpointing=False), module)
    assert not records.weights and not list(tmp_path.glob("*.csv"))

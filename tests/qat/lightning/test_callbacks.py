"""Oscillation and activation statistics, against values computed by hand."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from binaryvit.quantizers import BinaryWeight
from qat import QuantSpec
from qat.lightning.callbacks import OscillationTracker
from qat.quantizers import Phase
from qat.spec import Granularity


class Layer(nn.Module):
    """Three binary weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 1.0, 1.0]]))
        spec = QuantSpec(bits=1, granularity=Granularity.PER_CHANNEL)
        self.weight_quantizer = BinaryWeight(spec, (1, 3), centre=False)
        self.weight_quantizer.phase = Phase.QUANTIZE


class Toy(LightningModule):
    """Flips weight 0 in every step, weight 1 in step 1 only, weight 2 never.

    The gradient is g = 2 for weight 0, so that a step of size 1 takes 1 to -1; its sign alternates.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = Layer()
        self.automatic_optimization = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        target = self.model.weight.detach().clone()
        target[0, 0] *= -1
        if self.global_step == 1:
            target[0, 1] *= -1
        return 0.5 * (self.model.weight - target).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def _fit(
    tracker: OscillationTracker,
    tmp_path: Path,
    max_epochs: int,
    module: Toy | None = None,
    **settings: Any,
) -> Toy:
    module = module or Toy()
    last = ModelCheckpoint(tmp_path, f"last-{max_epochs}", enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        max_epochs=max_epochs,
        callbacks=[tracker, last],
    )
    trainer.fit(module, DataLoader([0] * 5, batch_size=1), weights_only=True, **settings)
    return module


def test_tracker_counts_flips_changes_and_oscillations_as_by_hand(tmp_path: Path) -> None:
    tracker = OscillationTracker(momentum=0.1, warmup=0.0)
    _fit(tracker, tmp_path, max_epochs=1)
    # Weight 0 flips in each of five steps, weight 1 once: 6 flips of 3 weights in 5 steps.
    assert tracker.last["flip_rate"] == pytest.approx(6 / 15)
    # After five flips weight 0 is negative, weight 1 stays so after one.
    assert tracker.last["changed"] == pytest.approx(2 / 3)
    # Only weight 0 ever undoes a flip.
    assert tracker.last["oscillating"] == pytest.approx(1 / 3)
    assert tracker.last["near_boundary"] == 0
    (seen,) = tracker.weights.values()
    # Steps 2 to 5 undo the flip before: f <- 0.9 f + 0.1, four times.
    assert seen.frequency[0].tolist() == pytest.approx([1 - 0.9**4, 0, 0])
    (layer,) = tracker.layers
    assert layer.pop("layer") == ""
    assert layer == pytest.approx(tracker.last, rel=1e-6)


def test_flips_are_counted_by_epoch_and_summarized_over_all(tmp_path: Path) -> None:
    tracker = OscillationTracker()
    _fit(tracker, tmp_path, max_epochs=10)
    assert tracker.flip_rates == pytest.approx([6 / 15] + [5 / 15] * 9)
    summary = tracker.summary()
    assert summary["flip_rate"] == pytest.approx((6 / 15 + 9 * 5 / 15) / 10)
    assert summary["flip_rate_late"] == pytest.approx(5 / 15)
    # After fifty steps weight 0 is back at its first sign.
    assert summary["changed"] == pytest.approx(1 / 3)


def test_late_flip_rate_is_that_of_the_ninth_tenth_of_the_epochs() -> None:
    tracker = OscillationTracker()
    tracker.flip_rates = [float(i) for i in range(20)]
    assert tracker.summary()["flip_rate_late"] == 16.5
    assert tracker.summary()["flip_rate"] == 9.5
    tracker.flip_rates = [3.0]
    assert tracker.summary()["flip_rate_late"] == 3.0


def test_flips_of_the_warmup_do_not_count_as_oscillations(tmp_path: Path) -> None:
    tracker = OscillationTracker(momentum=0.1, warmup=0.4)
    _fit(tracker, tmp_path, max_epochs=1)
    (seen,) = tracker.weights.values()
    # Of steps 1 to 5 the first two are warm-up; 3, 4 and 5 undo the flip before.
    assert seen.frequency[0, 0].item() == pytest.approx(1 - 0.9**3)
    assert tracker.last["flip_rate"] == pytest.approx(6 / 15)


def test_resumed_tracker_continues_what_the_whole_run_counts(tmp_path: Path) -> None:
    whole, first, second = (OscillationTracker(momentum=0.1) for _ in range(3))
    _fit(whole, tmp_path / "whole", max_epochs=4)
    # The same run, cut after two epochs; the second half starts with another tracker and module.
    _fit(first, tmp_path, max_epochs=2)
    _fit(second, tmp_path, max_epochs=4, ckpt_path=tmp_path / "last-2.ckpt")
    assert second.flip_rates == whole.flip_rates
    assert second.summary()["changed"] == whole.summary()["changed"]
    ours, theirs = (next(iter(t.weights.values())) for t in (second, whole))
    assert torch.equal(ours.start, theirs.start)
    assert torch.equal(ours.direction, theirs.direction)


def test_state_survives_a_checkpoint_without_code(tmp_path: Path) -> None:
    tracker = OscillationTracker()
    _fit(tracker, tmp_path, max_epochs=1)
    torch.save(tracker.state_dict(), tmp_path / "state")
    restored = OscillationTracker()
    restored.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert restored.summary() == tracker.summary()
    assert restored.step == tracker.step == 5
    expected = next(iter(tracker.weights.values())).state_dict()
    found = next(iter(restored.weights.values())).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


def test_model_without_quantized_weights_has_nothing_to_summarize(tmp_path: Path) -> None:
    module = Toy()
    module.model.weight_quantizer = None
    tracker = OscillationTracker()
    _fit(tracker, tmp_path, max_epochs=1, module=module)
    assert tracker.summary() == {}


def test_tracker_does_not_change_training(tmp_path: Path) -> None:
    module = Toy()
    start = copy.deepcopy(module.model.weight)
    found = _fit(OscillationTracker(), tmp_path, max_epochs=1, module=module).model.weight
    assert found.tolist() == [[-1.0, -1.0, 1.0]] != start.tolist()

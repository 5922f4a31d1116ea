"""The modules without our command line: a plain `Trainer`, plain loaders, a notebook."""

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import qat
from qat.checkpoint import read
from qat.data.sources import digits, subset
from qat.lightning.data import VisionData
from qat.lightning.modules import Distillation
from qat.quantizers import Phase, quantizers
from tests import runs
from tests.conftest import make_tiny_vit


def _loader(count: int, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size, shuffle)


def _trainer(tmp_path: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": False, **quiet, **settings}
    return Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), **options
    )


class First(Callback):
    """Keeps the images of the first training step."""

    images: Tensor

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.images = batch[0]


@pytest.mark.slow
def test_example_of_a_notebook_trains_a_model_that_reads_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.filters", [("ignore", None, Warning, None, 0)])
    torch.manual_seed(0)
    found = runpy.run_path(str(runs.ROOT / "examples" / "plain_lightning.py"))
    assert float(capsys.readouterr().out.split()[-1]) > 0.5
    assert all(q.phase is Phase.QUANTIZE for _, q in quantizers(found["module"].model))


def test_first_training_images_calibrate_and_the_order_of_training_stays_as_it_was(
    tmp_path: Path,
) -> None:
    """Calibration draws nothing from the global random numbers: a float model sees the same."""
    seen: list[Tensor] = []

    def initialise(model: nn.Module, batches: Iterator[Tensor], journal: Any) -> None:
        seen.extend(batches)
        qat.calibrate(model, seen)

    first = {}
    for plan in (None, "w4a4"):
        module = Distillation(make_tiny_vit(), plan=plan, initialise=initialise)
        torch.manual_seed(1)
        loaders = _loader(128, 16, shuffle=True), _loader(16, 16)
        first[plan] = First()
        _trainer(tmp_path, first[plan], limit_train_batches=1).fit(module, *loaders)
    assert [len(images) for images in seen] == [16, 16]
    assert torch.equal(first[None].images, first["w4a4"].images)


def test_loss_of_validation_is_the_mean_over_images_whatever_the_batches(tmp_path: Path) -> None:
    module = Distillation(make_tiny_vit())
    losses = [
        _trainer(tmp_path).validate(module, _loader(24, size), verbose=False)[0]["val/loss"]
        for size in (24, 16, 7)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_data_module_follows_the_model_of_the_trainer(tmp_path: Path) -> None:
    data = VisionData(
        train=subset(digits("train"), range(32)),
        val=subset(digits("test"), range(16)),
        batch_size=16,
    )
    module = Distillation(make_tiny_vit(), plan="w4a4")
    _trainer(tmp_path, limit_train_batches=1).fit(module, data)
    assert data.expected == module.model.card.preprocessing  # type: ignore[union-attr]


def test_data_module_of_the_user_calibrates_by_its_training_images(tmp_path: Path) -> None:
    class Own(LightningDataModule):
        def train_dataloader(self) -> Any:
            return _loader(32, 16)

        def val_dataloader(self) -> Any:
            return _loader(16, 16)

    module = Distillation(make_tiny_vit(), plan="w4a4")
    _trainer(tmp_path, limit_train_batches=1).fit(module, Own())
    assert all(q.phase is Phase.QUANTIZE for _, q in quantizers(module.model))


def test_checkpoint_of_a_plain_trainer_is_plain_data_and_gives_the_same_predictions(
    tmp_path: Path,
) -> None:
    module, path = Distillation(make_tiny_vit(), plan="w4a4"), tmp_path / "a.ckpt"
    trainer = _trainer(tmp_path, limit_train_batches=1)
    trainer.fit(module, _loader(32, 16), _loader(16, 16))
    trainer.save_checkpoint(path)
    assert read(path)["hyper_parameters"]["plan"] == "w4a4"
    loader = _loader(16, 8)
    labelled = torch.cat(trainer.predict(module, loader))  # type: ignore[arg-type]
    again = Distillation.load_from_checkpoint(path)
    images = DataLoader(loader.dataset.tensors[0], 8)  # type: ignore[attr-defined]
    bare = torch.cat(_trainer(tmp_path).predict(again, images))  # type: ignore[arg-type]
    assert torch.equal(labelled, bare)


COMPILED = """
from functools import partialmethod
import torch, qat
from torch._dynamo.testing import CompileCounter
from qat.train.losses import Objective
from tests.qat.lightning.test_plain import Distillation, Path, _loader, _trainer, make_tiny_vit, nn

graphs = CompileCounter()
nn.Module.compile = partialmethod(nn.Module.compile, backend=graphs, fullgraph=True)
qat.save(make_tiny_vit(), "teacher.ckpt")
module = Distillation(
    make_tiny_vit(), "teacher.ckpt", "w4a4", objective=Objective(0.5, 0.5), compile=True
)
names = list(module.state_dict())
trainer = _trainer(Path(), max_epochs=3, num_sanity_val_steps=0)
trainer.fit(module, _loader(32, 16), _loader(32, 16))
print(graphs.frame_count, list(module.state_dict()) == names)
"""


@pytest.mark.slow
def test_compiled_training_has_one_graph_a_mode_and_checkpoints_of_the_same_names(
    tmp_path: Path,
) -> None:
    """Teacher, student in training, student in validation, whatever the number of epochs.

    In a process of its own, without the checks of shapes, which torch cannot compile.
    """
    (tmp_path / "compiled.py").write_text(COMPILED)
    found = subprocess.run(
        [sys.executable, "compiled.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(runs.ROOT)},
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == ["3", "True"], found.stderr

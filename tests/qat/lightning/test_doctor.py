"""The doctor says the very fault that a test puts into a training, and nothing of a healthy one."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch.optim import AdamW

import qat
from binaryvit import BinaryQuantizers
from binaryvit.convert import react_
from binaryvit.grs import GRS, DistancePull, constant
from qat.cli.main import make_parser
from qat.lightning.callbacks import OscillationTracker
from qat.lightning.doctor import Doctor
from qat.lightning.modules import Distillation
from qat.train import doctor as faults
from qat.train.doctor import Diagnosis
from qat.train.losses import Objective
from tests import runs
from tests.conftest import make_tiny_vit
from tests.qat.common import plan
from tests.qat.lightning.test_modules import fit


class Fault(Callback):
    """Does something to the module before each step."""

    def __init__(self, harm: Callable[[Any], Any]) -> None:
        self.harm = harm

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.harm(pl_module.model)


def _lsq(lr: float = 1e-3, optimizer: Any = None) -> Distillation:
    torch.manual_seed(0)
    made = optimizer or partial(AdamW, lr=lr)
    return Distillation(make_tiny_vit(), plan=plan(4).to_list(), optimizer=made)


def _binary(lr: float, strength: float = 0.1) -> Distillation:
    torch.manual_seed(0)
    return Distillation(
        make_tiny_vit(),
        plan=str(runs.ROOT / "configs/plans/vit_binary.yaml"),
        quantizer=BinaryQuantizers(),
        convert=react_,
        optimizer=partial(AdamW, lr=lr),
        regularizer=GRS(DistancePull(), strength, constant),
    )


def _seen(module: Distillation, path: Path, *callbacks: Callback, **settings: Any) -> Doctor:
    """The doctor of a training."""
    doctor = Doctor(tell=lambda _: None)
    short: dict[str, Any] = {"limit_train_batches": 2, "limit_val_batches": 1}
    fit(module, path, *callbacks, OscillationTracker(), doctor, **short | settings)
    return doctor


def _only(doctor: Doctor) -> dict[str, str]:
    (found,) = doctor.found
    return found


def test_negative_scale_is_found(tmp_path: Path) -> None:
    def harm(model: Any) -> None:
        model.blocks[0].attn.qkv.weight_quantizer.scale[0] = -0.1

    found = _only(_seen(_lsq(), tmp_path, Fault(harm)))
    assert found["fault"] == "scales"
    assert found["layer"] == "blocks.0.attn.qkv.weight_quantizer"
    assert found["evidence"].startswith("1 of ")


def test_saturation_is_found(tmp_path: Path) -> None:
    def harm(model: Any) -> None:
        model.blocks[1].mlp.fc1.input_quantizer.scale.fill_(1e-2)

    found = _only(_seen(_lsq(), tmp_path, Fault(harm)))
    assert (found["fault"], found["layer"]) == ("saturation", "blocks.1.mlp.fc1.input_quantizer")


def _break_weight(model: Any) -> None:
    model.blocks[1].mlp.fc1.weight[0, 0] = torch.nan


def _overflow(model: Any) -> None:
    model.blocks[1].mlp.fc2.bias.fill_(3e38)


@pytest.mark.parametrize(
    ("harm", "layer", "evidence"),
    [
        (_break_weight, "blocks.1.mlp.fc1.weight_quantizer", "from what is not finite"),
        (_overflow, "norm", "from inputs and weights that are finite"),
    ],
)
def test_the_layer_in_which_nan_appears_first_is_named(
    harm: Callable[[Any], None], layer: str, evidence: str, tmp_path: Path
) -> None:
    doctor = Doctor(tell=lambda _: None)
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        fit(_lsq(), tmp_path, Fault(harm), doctor, num_sanity_val_steps=0)
    found = _only(doctor)
    assert (found["fault"], found["layer"]) == ("not_finite", layer)
    assert found["evidence"] == f"at step 0, {evidence}"


def test_weight_decay_on_scales_is_found(tmp_path: Path) -> None:
    def all_decay(groups: Iterable[Any]) -> AdamW:
        return AdamW([p for group in groups for p in group["params"]], lr=1e-3, weight_decay=0.1)

    assert _only(_seen(_lsq(optimizer=all_decay), tmp_path))["fault"] == "decay_of_scales"


def test_average_that_hurts_is_found(tmp_path: Path) -> None:
    average = EMAWeightAveraging(decay=0.5)

    def harm(model: Any) -> None:
        assert average._average_model is not None
        average._average_model.module.model.head.bias[0] = 50.0

    module = _lsq()
    assert _only(_seen(module, tmp_path, average, Fault(harm)))["fault"] == "averaging"


def test_plateau_of_one_bit_is_found(tmp_path: Path) -> None:
    found = _only(_seen(_binary(lr=1e-9, strength=0.0), tmp_path, max_epochs=15))
    assert found["fault"] == "plateau"


def test_signs_frozen_by_grs_are_found(tmp_path: Path) -> None:
    found = _only(_seen(_binary(lr=3e-3, strength=1e4), tmp_path, max_epochs=3))
    assert found["fault"] == "frozen_signs"
    assert found["suggestion"] == "--model.regularizer.init_args.strength 1e+03"


@pytest.mark.parametrize("make", [_lsq, partial(_binary, lr=3e-3)])
def test_healthy_training_is_silent(make: Callable[[], Distillation], tmp_path: Path) -> None:
    average = EMAWeightAveraging(decay=0.5)
    assert _seen(make(), tmp_path, average, max_epochs=3).found == []


def test_doctor_does_not_change_training(tmp_path: Path) -> None:
    watched, alone = _lsq(), _lsq()
    _seen(watched, tmp_path, EMAWeightAveraging(decay=0.5), max_epochs=2)
    short: dict[str, Any] = {"limit_train_batches": 2, "limit_val_batches": 1}
    fit(alone, tmp_path, EMAWeightAveraging(decay=0.5), max_epochs=2, **short)
    ours, theirs = watched.model.state_dict(), alone.model.state_dict()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(ours[name], value), name


def test_a_fault_is_said_once_in_a_run_that_is_resumed(tmp_path: Path) -> None:
    def harm(model: Any) -> None:
        model.blocks[0].attn.qkv.weight_quantizer.scale[0] = -0.1

    first = _seen(_lsq(), tmp_path, Fault(harm))
    said: list[Any] = []
    resumed = Doctor(tell=said.append)
    resumed.load_state_dict(first.state_dict())
    fit(_lsq(), tmp_path, Fault(harm), resumed, limit_train_batches=1)
    assert (said, len(resumed.found)) == ([], 1)


def test_strict_ends_the_run_by_one_line_that_is_kept(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = "configs/qat/digits_w4a4_lsq.yaml", tmp_path / "run"
    words = ("--config", config, "--model.teacher", teacher, "--run_dir", folder, *runs.SHORT)
    broken = ("--model.optimizer.init_args.lr", "3.0")
    assert runs.run("fit", *words, *broken, "--doctor.strict", "true") == 1
    assert "the learning rate drives trained scales" in capsys.readouterr().err
    line, *_ = (folder / "doctor.txt").read_text().splitlines()
    assert line.startswith("the learning rate drives trained scales through zero: ")
    assert not (folder / "metrics.json").exists()


class BadBatch(Callback):
    """Fails in the middle of the first batch that validates."""

    def on_validation_batch_start(self, *_: Any) -> None:
        raise OSError("no such image")


@pytest.mark.parametrize("make", [_lsq, partial(_binary, lr=3e-3)])
def test_no_hook_stays_on_a_model_whose_validation_fails(
    make: Callable[[], Distillation], tmp_path: Path
) -> None:
    """Of doctor, tracker, and the taps of an objective that compares layers."""
    teacher = tmp_path / "teacher.ckpt"
    qat.save(make_tiny_vit(), teacher)
    tapped = Distillation(
        make().model, teacher=str(teacher), objective=Objective(hard=1.0, feature=1.0)
    )
    callbacks = (OscillationTracker(), Doctor(tell=lambda _: None), BadBatch())
    with pytest.raises(OSError, match="no such image"):
        fit(tapped, tmp_path, *callbacks)
    assert tapped.teacher is not None
    for model in (tapped.model, tapped.teacher):
        for name, part in model.named_modules():
            assert not part._forward_hooks and not part._forward_pre_hooks, name


def test_doctor_that_is_turned_off_watches_nothing(teacher: Path, tmp_path: Path) -> None:
    config, folder = "configs/qat/digits_w4a4_lsq.yaml", tmp_path / "run"
    words = ("--config", config, "--model.teacher", teacher, "--run_dir", folder, *runs.SHORT)
    broken = ("--model.optimizer.init_args.lr", "3.0")
    assert runs.run("fit", *words, *broken, "--doctor.enabled", "false") == 0
    assert "doctor" not in runs.metrics(folder) and not (folder / "doctor.txt").exists()


def test_metrics_hold_what_the_doctor_said(lsq_run: Path, binary_run: Path) -> None:
    assert runs.metrics(lsq_run)["doctor"] == runs.metrics(binary_run)["doctor"] == []


def _faults() -> list[Diagnosis]:
    """One of each kind, and each suggestion."""
    one = torch.ones(1)
    found = [
        faults.signs_of_scales({"a": -one}, {"a": one}, 0.01),
        faults.saturation({"a": (8, 1.0)}),
        faults.not_finite(0, "a", True, "32-true"),
        faults.not_finite(0, "a", True, "bf16-mixed"),
        faults.decay_of_scales({"a": 0.1}),
        faults.averaging(1.0, 2.0),
        faults.plateau([1.0, 1.0, 1.0], 30, 0.01),
        faults.plateau([1.0, 2.0, 2.0], 30, 0.01),
        faults.frozen_signs([0.0], [1.0], 0.1),
    ]
    assert None not in found
    return [diagnosis for diagnosis in found if diagnosis]


def test_every_suggestion_is_a_flag_of_fit(teacher: Path) -> None:
    parser = make_parser("fit")
    for diagnosis in _faults():
        words = diagnosis.suggestion.split()
        config = parser.parse_args(["--config", str(runs.ROOT / "configs/default.yaml"), *words])
        assert config is not None


def test_page_of_the_doctor_has_a_row_for_each_fault() -> None:
    page = (runs.ROOT / "docs/doctor.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted({diagnosis.fault for diagnosis in _faults()})

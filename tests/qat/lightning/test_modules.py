"""Training steps: what decays, what is calibrated, what the teacher and the regularizer do."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from rich.console import Console
from torch import Tensor, nn

import qat
from binaryvit.grs import GRS, DistancePull, constant
from binaryvit.quantizers import BinaryWeight
from qat.card import amend, expected_by
from qat.checkpoint import MANIFEST, digest, read
from qat.cli.progress import RunJournal
from qat.data.sources import digits, subset
from qat.journal import Journal
from qat.layers import quantized_weights
from qat.lightning.data import VisionData
from qat.lightning.modules import Distillation
from qat.lightning.training import parameter_groups
from qat.models import num_classes_of
from qat.quantizers import Phase, quantizers
from qat.train.losses import Objective
from tests import runs
from tests.conftest import make_tiny_vit
from tests.qat.common import assert_same_state, plan, quantized, snapshot

SOFT = Objective(hard=0.0, soft=1.0)


class Recorder(Callback):
    """Calls `see(module)` at the end of every batch."""

    def __init__(self, see: Any) -> None:
        self.see = see
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        self.seen.append(self.see(pl_module))


def fit(module: Distillation, tmp_path: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    """Four steps of 16 digits, and 32 to validate."""
    data = VisionData(
        train=subset(digits("train"), range(64)),
        val=subset(digits("test"), range(32)),
        batch_size=16,
        num_calibration=16,
    )
    data.attach(expected_by(module.model), num_classes_of(module.model))
    options: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": False}
    options |= {"use_distributed_sampler": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **{**options, **settings},
    )
    trainer.fit(module, datamodule=data)
    return trainer


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """Checkpoint of a tiny float model, as a teacher."""
    path = tmp_path / "teacher.ckpt"
    qat.save(make_tiny_vit(), path)
    return str(path)


def _lsq(**settings: Any) -> Distillation:
    torch.manual_seed(0)
    return Distillation(make_tiny_vit(), plan=plan(4).to_list(), **settings)


def sgd(groups: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize("kind", ["float", "lsq", "react"])
def test_every_parameter_is_in_one_group_and_only_matrices_of_layers_decay(
    kind: str, tiny_vit: nn.Module, images: Tensor
) -> None:
    model = tiny_vit if kind == "float" else quantized(tiny_vit, images, kind)
    decays, stays = parameter_groups(model)
    assert "weight_decay" not in decays
    assert stays["weight_decay"] == 0.0
    grouped = [id(parameter) for group in (decays, stays) for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj")]
    layers += [f"blocks.{i}.mlp.{name}" for i in (0, 1) for name in ("fc1", "fc2")]
    expected = {f"{name}.weight" for name in (*layers, "patch_embed.proj", "head")}
    assert {names[id(parameter)] for parameter in decays["params"]} == expected


def test_scales_of_more_than_one_axis_do_not_decay(tiny_vit: nn.Module, images: Tensor) -> None:
    quantized(tiny_vit, images, "lsq")
    owned = [p for _, quantizer in quantizers(tiny_vit) for p in quantizer.parameters()]
    assert any(p.ndim >= 2 for p in owned), "the case is not covered"
    stays = {id(parameter) for parameter in parameter_groups(tiny_vit)[1]["params"]}
    assert {id(p) for p in owned} <= stays


def test_frozen_parameter_is_in_no_group(tiny_vit: nn.Module) -> None:
    tiny_vit.head.weight.requires_grad_(False)
    groups = parameter_groups(tiny_vit)
    assert tiny_vit.head.weight not in {p for group in groups for p in group["params"]}


def test_weight_decay_of_the_optimizer_leaves_norms_and_scales_alone(tmp_path: Path) -> None:
    def decay_only(groups: Iterable[Any]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=1e-12, weight_decay=1e11)

    module = _lsq(optimizer=decay_only)
    trainer = fit(module, tmp_path, max_steps=1)
    assert trainer.global_step == 1
    assert module.model.blocks[0].attn.qkv.weight.abs().max() < 0.3
    assert torch.allclose(module.model.norm.weight, torch.ones(64))
    scale = module.model.blocks[0].attn.qkv.weight_quantizer.scale
    untouched = _lsq()
    fit(untouched, tmp_path, max_steps=0)
    # Decay would have taken a tenth of it.
    assert torch.allclose(scale, untouched.model.blocks[0].attn.qkv.weight_quantizer.scale)


def test_quantizers_are_initialised_once_from_calibration_images_at_the_start(
    tmp_path: Path,
) -> None:
    calls: list[tuple[set[Phase], list[Tensor]]] = []

    def initialise(model: nn.Module, batches: Iterable[Tensor], journal: Journal) -> None:
        batches = list(batches)
        calls.append(({q.phase for _, q in quantizers(model)}, batches))
        qat.calibrate(model, batches)

    module = _lsq(initialise=initialise)
    trainer = fit(module, tmp_path, max_epochs=2)
    fit(module, tmp_path)
    ((phases, batches),) = calls
    assert phases == {Phase.FLOAT}
    expected = trainer.datamodule.calibration_batches()
    assert torch.equal(torch.cat(batches), torch.cat(expected))
    assert {q.phase for _, q in quantizers(module.model)} == {Phase.QUANTIZE}


def test_float_model_is_not_calibrated(tmp_path: Path) -> None:
    def initialise(model: nn.Module, batches: Iterable[Tensor], journal: Journal) -> None:
        raise AssertionError("called")

    assert fit(Distillation(make_tiny_vit(), initialise=initialise), tmp_path).global_step == 4


def test_teacher_is_outside_the_checkpoint_never_trains_and_stays_in_evaluation_mode(
    saved: str, tmp_path: Path
) -> None:
    module = Distillation(teacher=saved, plan=plan(4).to_list(), objective=SOFT, optimizer=sgd)
    before = snapshot(module.teacher)
    modes = Recorder(lambda m: [t.training for t in m.teacher.modules()])
    trainer = fit(module, tmp_path, modes, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "run.ckpt", weights_only=False)
    assert len(modes.seen) == 8
    assert not any(mode for seen in modes.seen for mode in seen)
    assert_same_state(snapshot(module.teacher), before)
    assert not any(p.requires_grad for p in module.teacher.parameters())
    checkpoint = read(tmp_path / "run.ckpt")
    student = {f"model.{name}" for name in module.model.state_dict()}
    assert {k for k in checkpoint["state_dict"] if k.startswith(("model.", "teacher"))} == student
    assert checkpoint[MANIFEST]["teacher_sha256"] == digest(module.teacher.state_dict())


def test_student_that_starts_from_the_teacher_is_a_copy_that_trains(
    saved: str, tmp_path: Path
) -> None:
    module = Distillation(teacher=saved, objective=SOFT, optimizer=sgd)
    assert_same_state(snapshot(module.model), snapshot(module.teacher))
    with torch.no_grad():
        module.teacher.head.bias.add_(1.0)  # a soft loss of zero would train nothing
    modes = Recorder(lambda m: [s.training for s in m.model.modules()])
    fit(module, tmp_path, modes)
    assert all(mode for seen in modes.seen for mode in seen)
    assert not torch.equal(module.model.head.weight, module.teacher.head.weight)


def test_student_returns_to_training_mode_after_validation(tmp_path: Path) -> None:
    modes = Recorder(lambda m: m.model.training)
    module = Distillation(make_tiny_vit())
    fit(module, tmp_path, modes, val_check_interval=2, max_epochs=2)
    assert modes.seen == [True] * 8


def test_soft_term_moves_the_student_towards_the_teacher(saved: str, tmp_path: Path) -> None:
    def distance(module: Distillation) -> float:
        images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            gap = module.model.eval()(images) - module.teacher(images)
        return float(gap.log_softmax(-1).square().mean())

    torch.manual_seed(1)
    module = Distillation(make_tiny_vit(), teacher=saved, objective=SOFT)
    before = distance(module)
    fit(module, tmp_path, max_epochs=4)
    assert distance(module) < before


def test_feature_term_alone_trains_features_and_leaves_the_head(saved: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = Distillation(
        make_tiny_vit(), teacher=saved, objective=Objective(hard=0.0, feature=1.0)
    )
    head = module.model.head.weight.detach().clone()
    losses = Recorder(lambda m: float(m.trainer.callback_metrics["train/feature"]))
    fit(module, tmp_path, losses, max_epochs=3)
    assert losses.seen[-1] < 0.9 * losses.seen[0]
    assert torch.equal(module.model.head.weight, head)


def test_feature_pattern_that_matches_nothing_is_refused(saved: str, tmp_path: Path) -> None:
    objective = Objective(hard=0.0, feature=1.0, feature_layers="stages.*")
    module = Distillation(teacher=saved, objective=objective)
    with pytest.raises(ValueError, match=r"feature_layers 'stages\.\*' matches no module"):
        fit(module, tmp_path)


def _binary(regularizer: GRS | None, optimizer: Any = sgd) -> Distillation:
    torch.manual_seed(0)
    from binaryvit import BinaryQuantizers

    return Distillation(
        make_tiny_vit(),
        plan=plan(1).to_list(),
        quantizer=BinaryQuantizers(),
        optimizer=optimizer,
        regularizer=regularizer,
    )


def _binary_weights(module: Distillation) -> list[Tensor]:
    found = quantized_weights(module.model)
    return [w.detach().clone() for _, w, q in found if isinstance(q, BinaryWeight)]


def test_coupled_regularizer_adds_its_term_to_the_gradient_of_the_step(tmp_path: Path) -> None:
    gradients: dict[str, list[Tensor]] = {}
    for name, regularizer in (("without", None), ("with", GRS(DistancePull(), 0.5, constant))):
        module = _binary(regularizer)
        fit(module, tmp_path, max_steps=0)  # calibrates
        starts = copy.deepcopy(module.model)
        fit(module, tmp_path, max_steps=1)
        after = _binary_weights(module)
        layers = list(quantized_weights(starts))
        gradients[name] = [
            (w.detach() - a) / 0.1 for (_, w, _), a in zip(layers, after, strict=True)
        ]
    for (_, weight, quantizer), plain, found in zip(
        layers, gradients["without"], gradients["with"], strict=True
    ):
        w, k = quantizer.latent(weight.detach()), quantizer.scale_of(weight.detach())
        sign = torch.where(w < 0, -1.0, 1.0)
        expected = plain - 0.5 * plain.abs().mean() * sign * (1 - w.abs() / k)
        assert torch.allclose(found, expected, atol=2e-5)
        assert not torch.allclose(found, plain, atol=2e-5)


def test_decoupled_regularizer_moves_weights_after_the_step_by_learning_rate_times_strength(
    tmp_path: Path,
) -> None:
    found = {}
    for name, regularizer in (
        ("without", None),
        ("with", GRS(DistancePull(), 0.5, constant, decoupled=True)),
    ):
        module = _binary(regularizer)
        fit(module, tmp_path, max_steps=1)
        found[name] = (_binary_weights(module), list(quantized_weights(module.model)))
    plain, layers = found["without"]
    for stepped, moved, (_, _, quantizer) in zip(plain, found["with"][0], layers, strict=True):
        w, k = quantizer.latent(stepped), quantizer.scale_of(stepped)
        sign = torch.where(w < 0, -1.0, 1.0)
        assert torch.allclose(moved, stepped + 0.1 * 0.5 * sign * (1 - w.abs() / k), atol=1e-6)
        assert not torch.allclose(moved, stepped, atol=1e-4)


def test_regularizer_sees_before_and_after_each_step_the_share_of_training_done(
    tmp_path: Path,
) -> None:
    seen: list[float] = []

    def note(progress: float) -> float:
        seen.append(progress)
        return 0.0

    fit(_binary(GRS(DistancePull(), 0.5, note, decoupled=True)), tmp_path, max_epochs=2)
    # Twice in a step: before the optimizer's and after it.
    assert seen == [i / 8 for i in range(8) for _ in range(2)]


def test_gradient_clipping_bounds_the_step(tmp_path: Path) -> None:
    starts, ends = [], []
    for clip in (None, 1e-3):
        torch.manual_seed(0)
        module = Distillation(make_tiny_vit(), optimizer=sgd)
        starts.append(nn.utils.parameters_to_vector(module.model.parameters()).detach())
        fit(module, tmp_path, max_steps=1, gradient_clip_val=clip)
        ends.append(nn.utils.parameters_to_vector(module.model.parameters()).detach())
    free, clipped = (float((b - a).norm()) for a, b in zip(starts, ends, strict=True))
    assert clipped == pytest.approx(1e-4, rel=0.02)
    assert free > 10 * clipped


@pytest.mark.parametrize("kind", ["lsq", "binary"])
def test_mixed_precision_trains_float32_parameters_to_finite_values(
    kind: str, tmp_path: Path
) -> None:
    module = _lsq() if kind == "lsq" else _binary(GRS(DistancePull()), torch.optim.AdamW)
    before = module.model.blocks[0].attn.qkv.weight.detach().clone()
    trainer = fit(module, tmp_path, precision="bf16-mixed", gradient_clip_val=1.0)
    assert not torch.equal(module.model.blocks[0].attn.qkv.weight, before)
    assert {p.dtype for p in module.model.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in module.model.parameters())
    assert 0 <= float(trainer.callback_metrics["val/top1"]) <= 1


def test_schedule_is_stepped_after_each_optimizer_step_and_ends_with_training(
    tmp_path: Path,
) -> None:
    rates = Recorder(lambda m: m.trainer.optimizers[0].param_groups[0]["lr"])
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    fit(Distillation(make_tiny_vit(), optimizer=sgd, lr_scheduler=cosine), tmp_path, rates)
    expected = [0.1 * (1 + torch.cos(torch.tensor(torch.pi * i / 4))) / 2 for i in (1, 2, 3, 4)]
    assert rates.seen == pytest.approx([float(rate) for rate in expected], abs=1e-7)


def test_averaged_weights_are_what_the_final_checkpoint_of_an_ema_run_holds(
    tmp_path: Path, images: Tensor
) -> None:
    module = _lsq()
    live = Recorder(lambda m: m.model.head.weight.detach().clone())
    average = EMAWeightAveraging(decay=0.5)
    last = ModelCheckpoint(tmp_path / "checkpoints", "last", enable_version_counter=False)
    start = module.model.head.weight.detach().clone()
    fit(module, tmp_path, average, live, last, enable_checkpointing=True, max_epochs=2)
    expected = live.seen[0]
    assert not torch.equal(expected, start)
    for weight in live.seen[1:]:
        expected = 0.5 * expected + 0.5 * weight
    assert torch.allclose(module.model.head.weight, expected, atol=1e-5)
    loaded = qat.load(tmp_path / "checkpoints" / "last.ckpt")
    assert {q.phase for _, q in quantizers(loaded)} == {Phase.QUANTIZE}
    assert torch.equal(loaded(images), module.model.eval()(images))


@pytest.mark.parametrize(
    "averaging",
    [
        WeightAveraging(),
        EMAWeightAveraging(decay=0.5),
        StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_that_copy_the_module_work_where_a_run_listens(
    averaging: Callback, tmp_path: Path
) -> None:
    module = _lsq()
    with RunJournal(tmp_path, Console(quiet=True)) as module.journal:
        fit(module, tmp_path, averaging, max_epochs=2)
    assert isinstance(module.journal, RunJournal)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_module_that_was_trained_can_be_copied_and_pickled(
    copied: Any, saved: str, tmp_path: Path, images: Tensor
) -> None:
    objective = Objective(hard=1.0, feature=1.0, feature_layers="blocks.*")
    module = Distillation(make_tiny_vit(), saved, plan(4).to_list(), objective=objective)
    module.journal = RunJournal(tmp_path, Console(quiet=True))
    fit(module, tmp_path)
    other = copied(module)
    assert torch.equal(other.eval()(images), module.eval()(images))
    fit(other, tmp_path)


def test_metrics_of_validation_are_those_of_the_images(tmp_path: Path) -> None:
    module = Distillation(make_tiny_vit())
    trainer = fit(module, tmp_path)
    images, labels, _ = zip(*trainer.datamodule.val_dataloader(), strict=True)
    with torch.no_grad():
        logits = module.model.eval()(torch.cat(images))
    truth = torch.cat(labels)
    top5 = (logits.topk(5).indices == truth[:, None]).any(1).float().mean()
    found = trainer.callback_metrics
    assert float(found["val/top1"]) == float((logits.argmax(1) == truth).float().mean())
    assert float(found["val/top5"]) == pytest.approx(float(top5))
    loss = nn.functional.cross_entropy(logits, truth)
    assert float(found["val/loss"]) == pytest.approx(float(loss), rel=1e-5)


def test_soft_objective_without_a_teacher_and_nothing_to_train_are_refused() -> None:
    with pytest.raises(ValueError, match=r"soft or feature term but there is no teacher"):
        Distillation(make_tiny_vit(), objective=SOFT)
    with pytest.raises(ValueError, match=r"no model: name one, --model, or model\.teacher"):
        Distillation()


@pytest.mark.parametrize("what", ["num_classes", "preprocessing"])
def test_student_of_another_task_than_the_teacher_is_refused(what: str, saved: str) -> None:
    model = make_tiny_vit()
    if what == "num_classes":
        model.reset_classifier(7)
    else:
        other = {"crop_pct": 1.0, "mean": (0.4,), "std": (0.5,)}
        other = qat.timm_model("vit_tiny_patch16_224", img_size=8, in_chans=1, data_config=other)
        amend(model, preprocessing=expected_by(other))
    with pytest.raises(ValueError, match=f"model and teacher disagree on {what}"):
        Distillation(model, teacher=saved, objective=SOFT)


LOAD = """
import sys
import torch
import qat

torch.set_num_threads(1)
images, *paths = sys.argv[1:]
images = torch.load(images)
torch.save([qat.load(path)(images) for path in paths], sys.stdout.buffer)
"""


@pytest.mark.slow
def test_last_checkpoint_gives_the_trained_logits_in_a_new_process(tmp_path: Path) -> None:
    images = torch.randn(4, 1, 8, 8)
    torch.save(images, tmp_path / "images")
    paths, expected = [], []
    for kind in ("lsq", "binary"):
        module = _lsq() if kind == "lsq" else _binary(GRS(DistancePull()), torch.optim.AdamW)
        last = ModelCheckpoint(tmp_path / kind, "last", enable_version_counter=False)
        fit(module, tmp_path, last, enable_checkpointing=True)
        paths.append(tmp_path / kind / "last.ckpt")
        expected.append(module.model.eval()(images))
    command = [sys.executable, "-c", LOAD, tmp_path / "images", *paths]
    result = subprocess.run(command, capture_output=True, cwd=runs.ROOT)
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    (tmp_path / "logits").write_bytes(result.stdout)
    for found, logits in zip(torch.load(tmp_path / "logits"), expected, strict=True):
        assert torch.equal(found, logits)

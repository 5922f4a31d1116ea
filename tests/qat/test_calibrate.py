"""Calibration: what it sets, and that a failure leaves the model as it was."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from qat import Phase, Plan, calibrate, convert_, observing, set_phase
from qat.quantizers import LSQ, quantizers
from tests.conftest import make_tiny_vit
from tests.qat.common import FACTORIES, assert_same_state, converted, snapshot

EVERY_FACTORY = pytest.mark.parametrize("factory", FACTORIES)


class DeadBranch(nn.Module):
    """Uses one of its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x.flatten(1))


def _vit(**model_args: object) -> nn.Module:
    return make_tiny_vit(depth=1, **model_args)


def _batches(*seeds: int) -> list[Tensor]:
    return [
        torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]


def _spoilt(value: float) -> list[Tensor]:
    good, bad = _batches(1, 2)
    bad[0, 0, 3, 3] = value
    return [good, bad]


def _interrupted() -> Iterator[Tensor]:
    yield from _batches(1)
    raise KeyboardInterrupt


def test_scale_is_that_of_the_observer_on_the_activations_of_the_float_model() -> None:
    model = _vit()
    seen: list[Tensor] = []
    hook = model.blocks[0].mlp.fc2.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    batches = _batches(1, 2)
    with torch.no_grad():
        for images in batches:
            model(images)
    hook.remove()
    calibrate(converted(model, "affine"), batches)
    expected = max(max(x.max() / 7, -x.min() / 8) for x in seen)
    torch.testing.assert_close(model.blocks[0].mlp.fc2.input_quantizer.scale, expected)


@EVERY_FACTORY
def test_every_quantizer_quantizes_afterwards_and_weights_are_as_before(factory: str) -> None:
    model = _vit()
    before = snapshot(model)
    calibrate(converted(model, factory), _batches(1))
    assert {quantizer.phase for _, quantizer in quantizers(model)} == {Phase.QUANTIZE}
    after = snapshot(model)
    assert_same_state({name: after[name] for name in before}, before)


@EVERY_FACTORY
def test_calibrating_twice_gives_the_state_of_calibrating_once(factory: str) -> None:
    model = converted(_vit(), factory)
    calibrate(model, _batches(1, 2))
    once = snapshot(model)
    calibrate(model, _batches(1, 2))
    assert_same_state(snapshot(model), once)


@EVERY_FACTORY
def test_what_an_earlier_calibration_saw_has_no_influence(factory: str) -> None:
    model = converted(_vit(), factory)
    calibrate(model, _batches(1))
    expected = snapshot(model)
    calibrate(model, [10 * images + 3 for images in _batches(2)])
    calibrate(model, _batches(1))
    assert_same_state(snapshot(model), expected)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (_spoilt(float("nan")), "calibration batch 1 holds NaN or infinite pixels"),
        (_spoilt(float("inf")), "calibration batch 1 holds NaN or infinite pixels"),
        ([], "calibration needs at least one batch of images, got none"),
    ],
    ids=["nan", "infinite", "empty"],
)
@pytest.mark.parametrize(("phase", "training"), [(Phase.FLOAT, True), (Phase.QUANTIZE, False)])
def test_failure_leaves_parameters_phases_and_mode_unchanged(
    batches: list[Tensor], message: str, phase: Phase, training: bool
) -> None:
    model = converted(_vit(), "lsq").train(training)
    calibrate(model, _batches(3))
    set_phase(model, phase)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        calibrate(model, batches)
    assert_same_state(snapshot(model), before)
    assert {module.training for module in model.modules()} == {training}


@EVERY_FACTORY
def test_interruption_leaves_every_kind_of_quantizer_unchanged(factory: str) -> None:
    model = converted(_vit(), factory)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, _interrupted())
    assert_same_state(snapshot(model), before)
    calibrate(model, _batches(1))  # nor do statistics of the broken run remain
    fresh = _vit()
    fresh.load_state_dict(model.state_dict(), strict=False)
    calibrate(converted(fresh, factory), _batches(1))
    assert_same_state(snapshot(model), snapshot(fresh))


@pytest.mark.parametrize("factory", ["lsq", "affine", "binary-StaticShift", "binary-ScaledShift"])
def test_model_that_computes_nan_is_refused_and_unchanged(factory: str) -> None:
    model = converted(_vit(), factory)
    with torch.no_grad():
        model.blocks[0].norm1.weight[0] = float("nan")
    before = snapshot(model)
    before.pop("blocks.0.norm1.weight")
    with pytest.raises(ValueError, match="NaN or infinite"):
        calibrate(model, _batches(1))
    after = snapshot(model)
    assert_same_state({name: after[name] for name in before}, before)


def test_unconverted_model_is_refused_with_what_to_do(tiny_vit: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"no quantizers; convert it first, see `qat\.convert_`"):
        calibrate(tiny_vit, _batches(1))


def test_layer_that_the_model_passes_by_is_named_as_such_and_the_model_unchanged() -> None:
    model = DeadBranch()
    four = {"bits": 4}
    plan = Plan.from_list([{"pattern": "*used", "weight": four, "input": four}])
    convert_(model, plan, LSQ)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"unused\.weight_quantizer: no batch came by it"):
        calibrate(model, [torch.randn(3, 1, 2, 2)])
    assert_same_state(snapshot(model), before)


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_every_module_is_restored(training: bool) -> None:
    model = converted(_vit(), "lsq").train(training)
    model.blocks[0].train(not training)  # such as a frozen part of a model in training
    modes = [module.training for module in model.modules()]
    calibrate(model, _batches(1))
    assert [module.training for module in model.modules()] == modes


def test_dropout_is_off_while_observing() -> None:
    scales = []
    for training in (True, False):
        torch.manual_seed(0)
        model = converted(_vit(proj_drop_rate=0.5), "lsq").train(training)
        calibrate(model, _batches(1))
        scales.append(model.blocks[0].mlp.fc1.input_quantizer.scale)
    assert torch.equal(*scales)


def test_batches_run_without_gradient_and_parameters_stay_trainable(tiny_vit: nn.Module) -> None:
    enabled: list[bool] = []
    converted(tiny_vit, "lsq")
    tiny_vit.head.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    calibrate(tiny_vit, _batches(1))
    assert enabled == [False]
    assert all(parameter.requires_grad for parameter in tiny_vit.parameters())


def test_observing_freezes_on_leaving_and_restores_if_the_block_raises(
    tiny_vit: nn.Module, images: Tensor
) -> None:
    converted(tiny_vit, "affine")
    before = snapshot(tiny_vit)
    with pytest.raises(ZeroDivisionError), observing(tiny_vit):
        tiny_vit(images)
        _ = 1 / 0
    assert_same_state(snapshot(tiny_vit), before)
    with observing(tiny_vit):
        tiny_vit(images)
    scales = {float(quantizer.scale.max()) for _, quantizer in quantizers(tiny_vit)}
    assert 1.0 not in scales
    assert {quantizer.phase for _, quantizer in quantizers(tiny_vit)} == {Phase.QUANTIZE}

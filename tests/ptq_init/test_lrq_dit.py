"""LRQ-DiT: float equality in both branches, what is chosen by what, baselines, state, refusals."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import qat
from ptq_init.lrq_dit import (
    AdaptiveRotation,
    DualRotation,
    HadamardRotation,
    LRQDiT,
    Rotate,
    input_statistics,
)
from qat import Phase, set_phase
from qat.diffusion import DiT
from qat.quantizers import Affine, DynamicToken, PerOperand, TwinLog, quantizers
from qat.transforms import Dual, Hadamard, Scaling
from tests.ptq_init.common import Memory
from tests.qat.common import assert_same_state, snapshot
from tests.qat.diffusion.common import converted, inputs, tiny_dit

QUICK = DualRotation(num_steps=10)
UNIFORM = PerOperand(input=DynamicToken)


def _batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    return [inputs(8), inputs(8, seed=1)]


def _salient() -> DiT:
    """A model one of whose layers sees a huge channel."""
    model = tiny_dit()
    with torch.no_grad():
        model.blocks[0].modulation.linear.bias[24 + 3] += 40  # shift of channel 3 before attention
    return model


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("rotate", [None, HadamardRotation(), QUICK, AdaptiveRotation(1.0)])
def test_transformed_model_in_float_computes_what_it_did(
    rotate: Rotate | None, smooth: bool
) -> None:
    model = converted(_salient())
    before = model(*inputs())
    LRQDiT(rotate, smooth)(model, _batches())
    assert all(quantizer.phase is Phase.QUANTIZE for _, quantizer in quantizers(model))
    assert (model(*inputs()) - before).norm() / before.norm() > 0.01
    set_phase(model, Phase.FLOAT)
    assert (model(*inputs()) - before).norm() / before.norm() < 1e-5


def test_fluctuation_decides_layer_by_layer_and_is_noted() -> None:
    model, journal = converted(_salient()), Memory()
    statistics = input_statistics(model, tuple(torch.cat(p) for p in zip(*_batches(), strict=True)))
    LRQDiT(AdaptiveRotation(8.0, salient=QUICK), smooth=False)(model, _batches(), journal)
    noted = {row["layer"]: row for row in journal.notes["transforms"]}
    assert len(noted) == 8
    for name, (layer, found) in statistics.items():
        kind = Hadamard if found.fluctuation < 8.0 else Dual
        assert [type(part) for part in layer.input_transform] == [kind]
        assert noted[name]["fluctuation"] == pytest.approx(found.fluctuation)
        assert noted[name]["transform"] == kind.__name__.lower()
    assert noted["blocks.0.attn.qkv"]["transform"] == "dual"
    assert [row["transform"] for row in noted.values()].count("dual") == 1


def test_statistics_are_those_of_the_layers_input_in_float() -> None:
    model = converted(tiny_dit())
    seen: list[Tensor] = []
    layer = model.blocks[1].mlp.fc1
    layer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    found = input_statistics(model, inputs())["blocks.1.mlp.fc1"][1]
    x = seen[0].detach()
    assert found.fluctuation == pytest.approx(float(x.square().mean().sqrt()))
    assert_close(found.largest, x.abs().amax((0, 1)))
    assert torch.equal(found.tokens, x.flatten(0, 1))


def test_smoothing_comes_before_the_rotation_and_fluctuation_before_both() -> None:
    model = converted(_salient())
    raw = input_statistics(model, _batches()[0])["blocks.0.attn.qkv"][1].fluctuation
    LRQDiT(AdaptiveRotation(raw * 0.9, salient=QUICK), smooth=True)(model, _batches()[:1])
    kinds = [type(part) for part in model.blocks[0].attn.qkv.input_transform]
    assert kinds == [Scaling, Dual]


def _error(rotate: Rotate | None, smooth: bool = False) -> float:
    """Output error of one layer with inputs of eight bits and two channels that are huge."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 128, generator=generator)
    x[:, 3], x[:, 70] = x[:, 3] + 60, x[:, 70] - 40
    model = nn.Sequential(nn.Linear(128, 32))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(32, 128, generator=generator))
        exact = model(x)
        rule = {"pattern": "0", "weight": {"bits": 8, "signed": False}, "input": {"bits": 8}}
        qat.convert_(model, qat.Plan.from_list([rule]), UNIFORM)
        LRQDiT(rotate, smooth)(model, [x])
        return float((model(x) - exact).norm() / exact.norm())


def test_rotations_and_scaling_help_where_channels_are_huge() -> None:
    plain = _error(None)
    assert _error(HadamardRotation()) < 0.5 * plain
    assert _error(DualRotation()) < 0.5 * plain
    assert _error(AdaptiveRotation()) == pytest.approx(_error(DualRotation()), rel=0.3)
    assert _error(None, smooth=True) < 0.9 * plain


def test_factories_choose_the_grid_and_nothing_else_changes() -> None:
    """Without transforms the initialiser is plain calibration of the weights."""
    model, other = (converted(tiny_dit(), factory=UNIFORM) for _ in range(2))
    LRQDiT(rotate=None, smooth=False)(model, _batches())
    qat.calibrate(other, _batches())
    assert_same_state(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("rotate", [HadamardRotation(), QUICK])
def test_rotations_travel_with_the_checkpoint(rotate: Rotate, tmp_path: Path) -> None:
    model = converted(tiny_dit())
    LRQDiT(rotate, smooth=True)(model, _batches())
    qat.save(model, tmp_path / "model.ckpt")
    loaded = qat.load(tmp_path / "model.ckpt")
    assert torch.equal(loaded(*inputs()), model(*inputs()))


def test_rotations_are_drawn_from_the_global_seed() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = converted(tiny_dit())
        LRQDiT(HadamardRotation())(model, _batches())
        states.append(snapshot(model))
    assert_same_state(states[0], states[1])
    signs = "blocks.0.attn.qkv.input_transform.hadamard.signs"
    assert not torch.equal(states[0][signs], states[2][signs])


def test_a_model_stays_as_it_was_where_something_fails() -> None:
    model = converted(tiny_dit())
    before = snapshot(model)
    broken = inputs()
    broken[0][0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        LRQDiT()(model, [broken])

    class Failing(HadamardRotation):
        def __call__(self, statistics, generator):
            if statistics.tokens.shape[1] != 24:
                raise ValueError("no")
            return super().__call__(statistics, generator)

    with pytest.raises(ValueError, match="no"):
        LRQDiT(Failing(), smooth=True)(model, _batches())
    assert_same_state(model.state_dict(), before)


def test_a_model_without_quantized_inputs_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    spec = {"bits": 4, "signed": False}
    qat.convert_(model, qat.Plan.from_list([{"pattern": "0", "weight": spec}]), Affine)
    with pytest.raises(ValueError, match="rotate: null and smooth: false"):
        LRQDiT()(model, [torch.randn(2, 8)])
    LRQDiT(rotate=None, smooth=False)(model, [torch.randn(2, 8)])


def test_twin_log_weights_see_the_rotated_weight() -> None:
    model = converted(tiny_dit(), factory=PerOperand(weight=partial(TwinLog), input=DynamicToken))
    LRQDiT(HadamardRotation())(model, _batches())
    layer = model.blocks[0].mlp.fc2
    assert_close(layer.weight_quantizer.gain, layer.weight.abs().amax(1))

"""The benchmark of starts: its phases wait for each other, its cures do what they say."""

from dataclasses import asdict
from typing import Any

import pytest
import starts
import torch
from starts_cures import CURES, Dampen, Freeze, Pull
from starts_train import Job
from torch import nn

from qat.layers import QuantLinear
from qat.quantizers import Affine, Phase
from qat.spec import Granularity, QuantSpec


def _row(job: Job, top1: float) -> dict[str, Any]:
    metrics = {"top1": [0.1, 0.2, top1], "loss": [1.0, 1.0, 1.0]}
    named = {"stage": job.stage, "arm": job.arm, "seed": job.seed}
    return {**named, "settings": asdict(job), "metrics": metrics}


def test_a_phase_waits_for_its_settings_and_takes_the_best_of_them() -> None:
    (rates,) = starts.phases([], set())
    rows = [_row(job, top1=job.lr) for job in rates]
    second = starts.phases(rows, {job.name for job in rates})
    assert {job.lr for job in second[1]} == {max(starts.RATES)}
    assert {job.stage for jobs in second for job in jobs} >= {"starts", "plans", "binary"}
    done = [job for jobs in second for job in jobs]
    rows = [_row(job, top1=job.strength) for job in done]
    last = starts.phases(rows, {job.name for job in done})[-1]
    assert {job.cure: job.strength for job in last} == {
        cure: max(strengths) for cure, strengths in starts.STRENGTHS.items()
    }
    names = [job.name for job in (*done, *last)]
    assert len(set(names)) == len(names)


def _layer() -> QuantLinear:
    """Weights of 0.3 and 0.9 steps of one."""
    linear = nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[0.3, 0.9]])
    spec = QuantSpec(4, True, Granularity.PER_CHANNEL)
    quantizer = Affine(spec, (1, 2), learn_scale=True)
    quantizer.phase = Phase.QUANTIZE
    return QuantLinear(linear, quantizer)


@pytest.mark.parametrize("cure", [Pull(0.5), Dampen(0.5)])
def test_pull_and_dampen_lead_descent_towards_the_nearest_code(cure: Pull | Dampen) -> None:
    layer = _layer()
    layer.weight.grad = torch.ones(1, 2)
    cure.adjust_gradients(layer, progress=1.0)
    # Codes are 0 and 1, the gaps 0.3 and -0.1; both forms double them where mean|g| and step are 1.
    assert torch.allclose(layer.weight.grad, 1 + 0.5 * 2 * torch.tensor([[0.3, -0.1]]))


def test_freeze_holds_the_weight_that_oscillates_and_no_other() -> None:
    layer, cure = _layer(), CURES["freeze"](0.01)
    assert isinstance(cure, Freeze)
    for step in range(60):
        layer.weight.data[0, 0] = 0.4 + 0.2 * (step % 2)
        layer.weight.data[0, 1] += 0.001
        cure.adjust_weights(layer, lr=1.0, progress=1.0)
    (state,) = cure.weights.values()
    assert state.held.tolist() == [[True, False]]
    assert layer.weight[0, 0].item() in (0.0, 1.0)
    assert layer.weight[0, 1].item() == pytest.approx(0.96)

"""Converted models under torch.compile and autocast."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qat import calibrate, convert_
from qat.quantizers import Affine
from tests.qat.common import plan, quantized

ROOT = Path(__file__).parents[2]
# In its own process: the type checks that pytest adds to our functions would break the graph.
COUNT_BREAKS = """
import json
import torch
from qat import Phase, set_phase
from tests.conftest import make_tiny_vit
from tests.qat.common import quantized

images, breaks = torch.randn(2, 1, 8, 8), {}
for kind in ("lsq", "react"):
    model = quantized(make_tiny_vit(depth=1), images, kind)
    for phase in (Phase.FLOAT, Phase.QUANTIZE):
        set_phase(model, phase)
        torch._dynamo.reset()
        found = torch._dynamo.explain(model)(images)
        reasons = [str(broken.reason) for broken in found.break_reasons]
        breaks[f"{kind}-{phase}"] = (found.graph_count, reasons)
print(json.dumps(breaks))
"""


@pytest.fixture(scope="module")
def graphs() -> dict[str, tuple[int, list[str]]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", COUNT_BREAKS],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["lsq", "react"])
@pytest.mark.parametrize("phase", ["float", "quantize"])
def test_compiled_model_is_one_graph(
    kind: str, phase: str, graphs: dict[str, tuple[int, list[str]]]
) -> None:
    assert graphs[f"{kind}-{phase}"] == [1, []]


@pytest.mark.parametrize("kind", ["lsq", "affine", "react"])
def test_autocast_trains_with_finite_gradients(
    kind: str, tiny_vit: nn.Module, images: Tensor
) -> None:
    model = quantized(tiny_vit, images, kind).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert logits.dtype is torch.bfloat16
    logits.float().square().sum().backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    for name, parameter in trained:
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_autocast_changes_fine_grids_by_rounding_only(tiny_vit: nn.Module, images: Tensor) -> None:
    convert_(tiny_vit, plan(12), Affine)
    calibrate(tiny_vit, [images])
    exact = tiny_vit(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = tiny_vit(images).float()
    assert (found - exact).norm() < 0.02 * exact.norm()

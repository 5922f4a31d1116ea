"""Binary layers by the native kernels inside torch: the numbers of the simulation."""

import pytest
import torch
from torch import Tensor, library, nn

import qat
from binaryvit.native import binary_linear, native_
from qat import kernels
from tests.conftest import make_tiny_vit
from tests.qat.common import SHIFTS, converted

pytestmark = pytest.mark.skipif(
    not kernels.instruction_sets(), reason="built without a C++ compiler"
)


def _student(images: Tensor, shift: str = "StaticShift") -> nn.Module:
    model = converted(make_tiny_vit(), f"binary-{shift}")
    qat.calibrate(model, [images])
    for name, parameter in model.named_parameters():
        if name.endswith("shift"):  # the simulation's sums of zero are not exactly zero
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("shift", [shift.__name__ for shift in SHIFTS])
def test_native_layers_give_the_logits_of_the_simulation(shift: str, images: Tensor) -> None:
    model = _student(images, shift)
    with torch.no_grad():
        expected = model(images)
        assert len(native_(model)) == 8
        torch.testing.assert_close(model(images), expected, atol=2e-6, rtol=0)


def test_the_operator_is_one_that_compile_can_trust(images: Tensor) -> None:
    model = _student(images)
    native_(model)
    layer = model.get_submodule("blocks.0.attn.qkv")
    arguments = (torch.randn(2, 3, 64), layer.panels, layer.scale, layer.bias, layer.kind)
    library.opcheck(binary_linear, arguments, test_utils=("test_schema", "test_faketensor"))
    exported = torch.export.export(layer, (torch.randn(2, 3, 64),))
    assert any("lowbit.binary_linear" in str(node.target) for node in exported.graph.nodes)


def test_a_model_without_binary_layers_is_refused(tiny_vit: nn.Module) -> None:
    with pytest.raises(ValueError, match="no plain linear layer with binary weight"):
        native_(tiny_vit)


def test_without_kernels_it_is_refused(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_KERNELS", "numpy")
    with pytest.raises(ValueError, match="no native kernels here"):
        native_(_student(images))


def test_layers_that_are_not_calibrated_stay(images: Tensor) -> None:
    model = _student(images)
    qat.set_phase(model, qat.Phase.FLOAT)
    with pytest.raises(ValueError, match="no plain linear layer"):
        native_(model)

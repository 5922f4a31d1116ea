"""Transforms of inputs: float equality, closed forms, state."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from qat.cost.count import cost
from qat.layers import QuantLinear
from qat.transforms import Dual, Hadamard, Scaling, Transform, Transforms
from qat.transforms.rotation import dual_transformation, hadamard
from tests.qat.diffusion.common import converted, tiny_dit


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _parts(width: int) -> dict[str, Transform]:
    x = torch.randn(40, width, generator=_generator())
    x[:, 1] += 30
    signs = torch.randint(0, 2, (width,), generator=_generator()) * 2 - 1
    return {
        "scaling": Scaling(torch.rand(width, generator=_generator()) + 0.1),
        "hadamard": Hadamard(signs),
        "dual": Dual(*dual_transformation(x, width // 2, _generator(), num_steps=20)),
    }


def _matrix(part: Transform, width: int) -> Tensor:
    return part(torch.eye(width))


@pytest.mark.parametrize("width", [24, 64, 72])
@pytest.mark.parametrize(
    "names", [["hadamard"], ["dual"], ["scaling", "hadamard"], ["scaling", "dual"]]
)
def test_float_product_is_the_same_after_folding(width: int, names: list[str]) -> None:
    transform = Transforms(*(_parts(width)[name] for name in names))
    x = torch.randn(2, 5, width, generator=_generator())
    weight = torch.randn(7, width, generator=_generator())
    assert_close(transform(x) @ transform.fold(weight).T, x @ weight.T, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["hadamard", "dual"])
@pytest.mark.parametrize("width", [24, 64])
def test_rotations_are_orthogonal(kind: str, width: int) -> None:
    matrix = _matrix(_parts(width)[kind], width)
    assert (matrix @ matrix.T - torch.eye(width)).abs().max() < 1e-5


@pytest.mark.parametrize("width", [1, 2, 12, 24, 72])
def test_kronecker_form_is_signs_times_the_whole_hadamard_matrix(width: int) -> None:
    signs = torch.randint(0, 2, (width,), generator=_generator()) * 2 - 1
    assert_close(_matrix(Hadamard(signs), width), signs[:, None] * hadamard(width))


def test_dual_is_the_product_of_block_rotation_permutation_and_block_rotation() -> None:
    part = _parts(24)["dual"]
    assert isinstance(part, Dual)
    first, second = (torch.block_diag(block, block) for block in (part.first, part.second))
    permutation = torch.eye(24)[:, part.order]
    assert_close(_matrix(part, 24), first @ permutation @ second)


def test_a_layer_takes_a_transform_once_and_its_state_rebuilds_it() -> None:
    linear = nn.Linear(24, 5)
    layer = QuantLinear(linear)
    x = torch.randn(3, 24)
    before = layer(x)
    parts = _parts(24)
    layer.transform_(Transforms(parts["scaling"], parts["dual"]))
    assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    fresh = QuantLinear(nn.Linear(24, 5))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    with pytest.raises(ValueError, match="transformed already"):
        layer.transform_(Transforms(parts["hadamard"]))


def test_hadamard_matrices_take_no_room_in_the_state() -> None:
    state = Transforms(_parts(24)["hadamard"]).state_dict()
    assert {name: value.dtype for name, value in state.items()} == {"hadamard.signs": torch.int8}


def test_costs_count_the_transforms_of_inputs_in_float() -> None:
    """4 tokens of width 24 = 12 x 2: a product with each factor, 14 MACs; twice blocks of 12."""
    model = converted(tiny_dit())
    plain = cost(model)
    layer = model.get_submodule("blocks.0.attn.qkv")
    layer.transform_(Transforms(_parts(24)["hadamard"]))  # type: ignore[operator]
    rotated = cost(model)
    assert rotated.macs - plain.macs == 4 * 24 * (12 + 2)
    assert rotated.size_bytes == plain.size_bytes
    layer = model.get_submodule("blocks.0.mlp.fc1")
    layer.transform_(Transforms(_parts(24)["dual"]))  # type: ignore[operator]
    assert cost(model).macs - rotated.macs == 4 * 24 * 24
    assert cost(model).size_bytes - plain.size_bytes == 4 * 2 * 12 * 12

"""The check of a packed model against the simulated one: it passes equals and finds faults."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from binaryvit import BinaryQuantizers
from binaryvit.asm import DynamicShift
from binaryvit.convert import react_
from qat import runtime
from qat.export.verify import verify
from qat.quantizers import LSQ, DynamicToken, PerOperand
from qat.runtime import REFERENCE, Model
from qat.runtime.grids import Sign, Uniform
from tests.qat.common import plan
from tests.qat.export.common import packed, student


@pytest.fixture
def pair(images: Tensor, tmp_path: Path) -> tuple[torch.nn.Module, Model]:
    model = student(plan(4), LSQ, images)
    return model, packed(model, tmp_path)


@pytest.mark.parametrize("kind", ["react", "token", "lsq"])
def test_every_difference_of_a_packed_model_lies_on_a_threshold(
    kind: str, tmp_path: Path, images: Tensor
) -> None:
    """Tokens that find their own scale put many values right between two codes."""
    if kind == "react":
        model = student(plan(1), BinaryQuantizers(shift=DynamicShift), images, react_)
    else:
        token = PerOperand(default=LSQ, input=DynamicToken)
        model = student(plan(4), token if kind == "token" else LSQ, images)
    found = verify(model, packed(model, tmp_path), [torch.randn(24, 1, 8, 8)])
    found.require_same()
    items = found.items()
    assert items["n_images"] == 24
    assert items["n_codes_wrong"] == 0 == items["n_faults"]
    assert items["n_codes"] == sum(24 * n for n in _sizes(tokens=17, dim=64, heads=4, depth=2))


def _sizes(tokens: int, dim: int, heads: int, depth: int) -> list[int]:
    """Values on the grids of one image: inputs of four layers, operands of two products."""
    return depth * [tokens * (2 * dim + 5 * dim) + 3 * tokens * dim + heads * tokens**2]


def test_a_grid_that_computes_something_else_is_found(
    pair: tuple[torch.nn.Module, Model], images: Tensor
) -> None:
    model, wrong = pair
    grid = wrong.grids["blocks.0.attn.qkv.input_quantizer"]
    assert isinstance(grid, Uniform)
    grid.size = grid.size * np.float32(1.01)
    found = verify(model, wrong, [images])
    assert found.num_wrong > 0
    with pytest.raises(ValueError, match="codes differ for identical inputs"):
        found.require_same()


def test_a_layer_that_computes_something_else_is_traced_to_the_first_grid_behind_it(
    pair: tuple[torch.nn.Module, Model], images: Tensor
) -> None:
    model, wrong = pair
    norm = wrong.blocks[1].norm1
    norm.weight = norm.weight * np.float32(1.5)
    found = verify(model, wrong, [images])
    assert found.faults and {one.grid for one in found.faults} == {
        "blocks.1.attn.qkv.input_quantizer"
    }
    with pytest.raises(ValueError, match=r"first other code is in 'blocks\.1\.attn\.qkv"):
        found.require_same()


def test_a_difference_behind_the_last_grid_is_a_fault(
    pair: tuple[torch.nn.Module, Model], images: Tensor
) -> None:
    model, wrong = pair
    assert wrong.norm is not None
    wrong.norm.bias = wrong.norm.bias + np.float32(0.5)
    with pytest.raises(ValueError, match="all codes are equal"):
        verify(model, wrong, [images]).require_same()


def test_no_images_are_refused(pair: tuple[torch.nn.Module, Model]) -> None:
    with pytest.raises(ValueError, match="no images to verify with"):
        verify(*pair, [])


@torch.no_grad()
def test_a_sign_of_a_value_on_its_threshold_counts_as_such(images: Tensor, tmp_path: Path) -> None:
    model: Any = student(plan(1), BinaryQuantizers(), images)
    moved = packed(model, tmp_path)
    name = "blocks.0.attn.qkv.input_quantizer"
    shift, grid = model.get_submodule(name).shift.shift, moved.grids[name]
    assert isinstance(grid, Sign)
    on_it = model.blocks[0].norm1(model._pos_embed(model.patch_embed(images)))[0, 0]
    shift.copy_(on_it - 3e-6)
    grid.fixed = (on_it + 3e-6).numpy()
    found = verify(model, moved, [images])
    assert found.num_wrong == 0 < found.num_on_threshold
    assert {one.grid for one in found.differences} == {name}
    found.require_same()


@pytest.mark.parametrize(("off", "factor", "faults"), [(1, 1 - 1e-6, 0), (1.1, 0.7, 1)])
def test_a_flip_in_a_map_that_no_operation_shows_is_found_by_its_threshold(
    off: float, factor: float, faults: int, images: Tensor, tmp_path: Path
) -> None:
    """An attention lies on half of the map's scale, or off it; the runtime has another scale."""
    model: Any = student(plan(1), BinaryQuantizers(), images, react_)
    image, seen = images[:1], []
    quantizer = model.blocks[0].attn.av.left_quantizer
    hook = quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(image)
        quantizer.scale.fill_(2 * off * float(seen[0].median()))
    hook.remove()
    packed(model, tmp_path)
    attention = REFERENCE["binary_attention"]

    def moved(qkv: Any, threshold: Any, logit_scale: float, map_scale: float) -> Any:
        return attention(qkv, threshold, logit_scale, map_scale * factor)

    table = {**REFERENCE, "binary_attention": moved}
    found = verify(model, runtime.load(tmp_path / "model.lowbit", table), [image])
    assert len(found.differences) == 1
    assert len(found.faults) == faults
    if not faults:
        assert found.differences[0].grid == "blocks.0.attn.av.left_quantizer"

"""timm models by name: weights, their size, and what is refused."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from qat import timm_model
from tests.conftest import make_tiny_vit
from tests.qat.common import distilled_deit, swin

TINY = {"patch_size": 2, "embed_dim": 64, "depth": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def vit_weights() -> str:
    folder = os.environ.get("LOWBIT_ASSETS")
    if folder is None:
        pytest.skip("LOWBIT_ASSETS is not set; it names the folder that holds weights/")
    return str(Path(folder) / "weights" / "vit_tiny_patch16_224.safetensors")


def _saved(model: nn.Module, tmp_path: Path) -> str:
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    return str(path)


def _tiny(weights: str, **arguments: Any) -> nn.Module:
    given = {"img_size": 8, "in_chans": 1, "model_args": TINY, **arguments}
    return timm_model("vit_tiny_patch16_224", weights=weights, **given).eval()


@pytest.mark.parametrize("make", [make_tiny_vit, swin, distilled_deit])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_of_a_file_give_the_logits_of_the_model_that_was_saved(
    make: Callable[[], nn.Module], suffix: str, tmp_path: Path
) -> None:
    model = make()
    path = str(tmp_path / f"model.{suffix}")
    (torch.save if suffix == "pth" else save_file)(model.state_dict(), path)
    recipe = {key: value for key, value in model.card.recipe.items() if key != "num_classes"}
    x = torch.randn(2, 1, *model.card.preprocessing.input_size[1:])
    assert torch.equal(timm_model(**recipe, weights=path).eval()(x), model(x))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_weights_for_any_number_of_channels_are_loaded(
    channels: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = timm_model("vit_tiny_patch16_224", img_size=8, in_chans=channels, model_args=TINY)
    loaded = _tiny(_saved(model, tmp_path), in_chans=channels)
    if "Unable to convert" in caplog.text:
        pytest.skip("this timm, an older one, loads weights of 1 and 3 channels only")
    assert torch.equal(loaded.patch_embed.proj.weight, model.patch_embed.proj.weight)


def test_classifier_of_another_size_starts_anew_and_the_rest_is_loaded(
    tiny_vit: nn.Module, tmp_path: Path
) -> None:
    model = _tiny(_saved(tiny_vit, tmp_path), num_classes=3)
    assert model.head.weight.shape == (3, 64)
    found, expected = model.state_dict(), tiny_vit.state_dict()
    for name in expected.keys() - {"head.weight", "head.bias"}:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("changed", [{"depth": 3}, {"depth": 1}, {"embed_dim": 32}])
def test_weights_of_another_architecture_are_refused(
    num_classes: int | None, changed: dict[str, int], tiny_vit: nn.Module, tmp_path: Path
) -> None:
    path = _saved(tiny_vit, tmp_path)
    with pytest.raises(ValueError, match=r"cannot build 'vit_tiny_patch16_224' from .*another mo"):
        _tiny(path, num_classes=num_classes, model_args={**TINY, **changed})


def test_weights_without_the_models_classifier_are_refused(
    tiny_vit: nn.Module, tmp_path: Path
) -> None:
    path = _saved(tiny_vit, tmp_path)
    with pytest.raises(ValueError, match=r"has no 'head\.fc\.weight', and few names of 'swin_tiny"):
        timm_model("swin_tiny_patch4_window7_224", weights=path)


def test_missing_weights_file_asks_for_the_assets_variable() -> None:
    with pytest.raises(ValueError, match=r"no weights file 'nowhere\.pth'.*LOWBIT_ASSETS"):
        timm_model("vit_tiny_patch16_224", weights="nowhere.pth")


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pth"])
def test_broken_weights_file_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x80\x02not weights at all")
    with pytest.raises(ValueError, match=rf"weights file '.*{name}' cannot be read"):
        timm_model("vit_tiny_patch16_224", weights=str(path))


def test_unknown_model_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"no model 'vit_tiny_path16_224'; did you mean 'vit_tin"):
        timm_model("vit_tiny_path16_224")


@pytest.mark.parametrize("model_args", [{"deph": 2}, {"num_head": 2}])
def test_unknown_model_argument_is_refused_by_name(model_args: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"cannot build .*'{next(iter(model_args))}'"):
        timm_model("vit_tiny_patch16_224", model_args=model_args)


def test_channels_without_image_size_are_refused() -> None:
    with pytest.raises(ValueError, match="in_chans is 1: state img_size as well"):
        timm_model("vit_tiny_patch16_224", in_chans=1)


def test_recipe_builds_the_same_architecture_again() -> None:
    model = make_tiny_vit()
    again = timm_model(**model.card.recipe)
    assert again.card.recipe == model.card.recipe
    assert again.card.preprocessing == model.card.preprocessing
    assert again.load_state_dict(model.state_dict())


def test_recipe_is_not_changed_by_what_the_caller_does_later() -> None:
    arguments = dict(TINY)
    model = timm_model("vit_tiny_patch16_224", img_size=8, model_args=arguments)
    arguments["depth"] = 7
    assert model.card.recipe["model_args"]["depth"] == 2


def test_image_size_reaches_model_and_preprocessing() -> None:
    model = timm_model("vit_tiny_patch16_224", img_size=32, model_args={"depth": 1})
    assert model.card.preprocessing.input_size == (3, 32, 32)
    assert model.pos_embed.shape[1] == 1 + 2 * 2


def test_imagenet_weights_at_96_pixels_have_the_interpolated_position_embedding(
    vit_weights: str,
) -> None:
    model = timm_model("vit_tiny_patch16_224", img_size=96, weights=vit_weights)
    state = load_file(vit_weights)
    expected = resample_abs_pos_embed(state["pos_embed"], new_size=[6, 6], num_prefix_tokens=1)
    assert torch.equal(model.pos_embed, expected)
    assert torch.equal(model.blocks[11].mlp.fc2.weight, state["blocks.11.mlp.fc2.weight"])
    assert model.num_classes == 1000


@pytest.mark.parametrize(
    ("name", "num_classes"), [("vit_small_patch16_224", 10), ("resnet18", None)]
)
def test_imagenet_weights_of_another_model_give_one_clear_error(
    name: str, num_classes: int | None, vit_weights: str
) -> None:
    message = rf"cannot build '{name}' from .*another model|few names of '{name}'"
    with pytest.raises(ValueError, match=message) as caught:
        timm_model(name, weights=vit_weights, num_classes=num_classes)
    assert len(str(caught.value)) < 600

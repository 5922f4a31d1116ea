"""What is saved is what will be loaded, whatever became of the model before it was saved."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

import qat
from qat import Phase, Preprocessing, card_of
from qat.checkpoint import read
from qat.fidelity import require_loadable
from qat.quantizers import Affine, quantizers
from tests.conftest import make_tiny_vit
from tests.qat.common import quantized

PIXELS = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")


def own_model(width: int = 8, act: str = "relu") -> nn.Module:
    """A builder of the caller's, which draws its rates from a tensor as many do."""
    rates = torch.linspace(0, 0.1, 2).tolist()
    acts = {"relu": nn.ReLU, "gelu": nn.GELU}
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 4),
        acts[act](),
        nn.Dropout(rates[1]),
        nn.Flatten(),
        nn.Linear(128, 5),
    )


RECIPE = {"class_path": f"{__name__}.own_model", "init_args": {"width": 8}}


def _blocks_compiled(model: nn.Module) -> nn.Module:
    model.blocks[0] = torch.compile(model.blocks[0])
    return model


@pytest.mark.parametrize("compiled", [torch.compile, _blocks_compiled])
def test_compiled_model_is_saved_as_the_model_inside(
    compiled: Callable[[nn.Module], nn.Module], images: Tensor, tmp_path: Path
) -> None:
    model = quantized(make_tiny_vit(), images, "lsq")
    expected = model(images)
    qat.save(compiled(model), tmp_path / "model.ckpt")
    assert not any("_orig_mod" in name for name in read(tmp_path / "model.ckpt")["state_dict"])
    assert torch.equal(qat.load(tmp_path / "model.ckpt")(images), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_model_of_another_type_loads_in_that_type_with_the_same_logits(
    dtype: torch.dtype, when: str, images: Tensor, tmp_path: Path
) -> None:
    model = make_tiny_vit()
    model = model.to(dtype) if when != "after" else model
    if when != "never":
        images = images if when == "after" else images.to(dtype)
        quantized(model, images, "affine")
    model.to(dtype)
    qat.save(model, tmp_path / "model.ckpt")
    loaded = qat.load(tmp_path / "model.ckpt")
    assert {n: v.dtype for n, v in loaded.named_parameters()} == {
        n: v.dtype for n, v in model.named_parameters()
    }
    assert card_of(loaded).dtype is dtype
    assert torch.equal(loaded(images.to(dtype)), model(images.to(dtype)))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "classes": lambda model: model.reset_classifier(3),
    "pooling": lambda model: model.reset_classifier(10, global_pool="avg"),
    "image size": lambda model: model.set_input_size((16, 16)),
    "activation": lambda model: setattr(model.blocks[0].mlp, "act", nn.ReLU()),
    "epsilon": lambda model: setattr(model.norm, "eps", 0.1),
    "block": lambda model: model.blocks.append(nn.Identity()),
    "head": lambda model: setattr(model, "head", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_model_changed_after_it_was_built_is_refused_at_save(change: str, tmp_path: Path) -> None:
    model = make_tiny_vit()
    CHANGES[change](model)
    with pytest.raises(ValueError, match=r"qat\.adopt\(model\)") as caught:
        qat.save(model, tmp_path / "model.ckpt")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["classes", "image size"])
def test_changed_model_is_saved_once_it_is_adopted(change: str, tmp_path: Path) -> None:
    model = make_tiny_vit()
    CHANGES[change](model)
    qat.save(qat.adopt(model), tmp_path / "model.ckpt")
    loaded = qat.load(tmp_path / "model.ckpt")
    x = torch.randn(2, *loaded.card.preprocessing.input_size)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("arguments", [{}, {"num_classes": 7}, {"img_size": 32}])
def test_model_of_timm_is_adopted_and_saved_without_a_recipe(
    arguments: dict[str, int], tmp_path: Path
) -> None:
    model = qat.adopt(timm.create_model("test_vit", **arguments)).eval()
    qat.save(model, tmp_path / "model.ckpt")
    loaded = qat.load(tmp_path / "model.ckpt")
    x = torch.randn(2, *loaded.card.preprocessing.input_size)
    assert torch.equal(loaded(x), model(x))


def test_model_of_timm_with_further_arguments_needs_a_recipe_that_names_them(
    tmp_path: Path,
) -> None:
    model = qat.adopt(timm.create_model("test_vit", depth=1))
    with pytest.raises(ValueError, match=r"does not say how it is built.*recipe="):
        qat.save(model, tmp_path / "model.ckpt")
    qat.adopt(model, recipe={"name": "test_vit", "model_args": {"depth": 1}})
    qat.save(model, tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    "recipe",
    [
        {"class_path": f"{__name__}.own_model", "init_args": {"width": 4}},
        {"class_path": f"{__name__}.own_model", "init_args": {"act": "gelu"}},
        {"class_path": f"{__name__}.nobody"},
        {"name": "test_vit"},
        {"name": "nobody"},
        {},
    ],
    ids=str,
)
def test_recipe_of_another_model_is_refused_when_it_is_given(recipe: dict[str, object]) -> None:
    model = own_model()
    with pytest.raises(ValueError, match=r"card builds|could not rebuild"):
        qat.adopt(model, recipe=recipe, preprocessing=PIXELS)


def test_model_of_ones_own_loads_with_trust_alone(tmp_path: Path) -> None:
    model = qat.adopt(own_model(), recipe=RECIPE, preprocessing=PIXELS, class_names=list("abcde"))
    qat.convert_(model, qat.Plan.uniform(4, 8), Affine)
    x = torch.randn(2, 3, 16, 16)
    qat.calibrate(model.eval(), [x])
    qat.save(model, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"names the builder .*own_model.*trust="):
        qat.load(tmp_path / "model.ckpt")
    loaded = qat.load(tmp_path / "model.ckpt", trust=(__name__,))
    assert torch.equal(loaded(x), model(x))
    assert loaded.card == model.card


def test_model_of_torchvision_is_adopted_by_the_name_of_its_class(tmp_path: Path) -> None:
    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 1, "num_heads": 2}
    sizes |= {"hidden_dim": 16, "mlp_dim": 32, "num_classes": 5}
    path = f"{VisionTransformer.__module__}.{VisionTransformer.__name__}"
    model = VisionTransformer(**sizes).eval()
    qat.adopt(model, recipe={"class_path": path, "init_args": sizes}, preprocessing=PIXELS)
    qat.save(model, tmp_path / "model.ckpt")
    x = torch.randn(2, 3, 16, 16)
    loaded = qat.load(tmp_path / "model.ckpt", trust=("torchvision",))
    assert torch.equal(loaded(x), model(x))


def test_expanded_buffer_is_saved_with_its_values_and_nothing_more(tmp_path: Path) -> None:
    model = make_tiny_vit()
    model.cls_token.data = torch.ones(1, 1, 1000)[..., :64]
    qat.save(model, tmp_path / "model.ckpt")
    found = read(tmp_path / "model.ckpt")["state_dict"]["cls_token"]
    assert found.untyped_storage().nbytes() == 64 * 4


@pytest.mark.parametrize(
    ("value", "message"), [(torch.nan, "not finite"), (torch.inf, "not finite"), (0.0, "not posi")]
)
@pytest.mark.parametrize("kind", ["lsq", "affine", "react"])
def test_quantizer_without_a_grid_is_refused_at_save(
    kind: str, value: float, message: str, images: Tensor, tmp_path: Path
) -> None:
    model = quantized(make_tiny_vit(), images, kind)
    scaled = [q for _, q in quantizers(model) if hasattr(q, "scale")]
    with torch.no_grad():
        scaled[-1].scale.fill_(value)
    with pytest.raises(ValueError, match=rf"quantizer 'blocks.*scale holds .*{message}"):
        qat.save(model, tmp_path / "model.ckpt")


@pytest.mark.parametrize("phase", [Phase.FLOAT, Phase.OBSERVE])
def test_model_of_which_a_part_is_not_calibrated_is_refused_at_save(
    phase: Phase, images: Tensor, tmp_path: Path
) -> None:
    model = quantized(make_tiny_vit(), images, "lsq")
    model.blocks[0].mlp.fc1.input_quantizer.phase = phase
    with pytest.raises(ValueError, match=rf"not all of one phase .*fc1.* {phase}"):
        qat.save(model, tmp_path / "model.ckpt")


def test_settings_of_training_do_not_hinder_a_save() -> None:
    model = make_tiny_vit()
    model.set_grad_checkpointing()
    model.pos_drop.p = 0.3
    require_loadable(model.train())

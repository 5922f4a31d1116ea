"""Preprocessing: what a model states, and that a pipeline which differs is refused."""

import pytest
import timm
from timm.data import create_transform
from torch import nn
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from qat import timm_model
from qat.preprocessing import Preprocessing, check_transform, of_model

EXPECTED = Preprocessing((3, 32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic", 0.8, "center")


def _pipeline(
    size: int = 32,
    resize: int = 40,
    interpolation: str = "bicubic",
    mean: float = 0.5,
    std: float = 0.25,
) -> T.Compose:
    return T.Compose(
        [
            T.Resize(resize, InterpolationMode(interpolation)),
            T.CenterCrop(size),
            T.ToTensor(),
            T.Normalize((mean,) * 3, (std,) * 3),
        ]
    )


def test_preprocessing_survives_plain_data() -> None:
    data = EXPECTED.to_dict()
    as_yaml = {key: list(item) if isinstance(item, tuple) else item for key, item in data.items()}
    assert Preprocessing.from_dict(as_yaml) == EXPECTED


def test_preprocessing_of_a_model_is_that_of_its_timm_configuration() -> None:
    model = timm_model("vit_tiny_patch16_224", model_args={"depth": 1})
    half = (0.5, 0.5, 0.5)
    assert model.card.preprocessing == Preprocessing(
        (3, 224, 224), half, half, "bicubic", 0.9, "center"
    )


def test_stated_preprocessing_overrides_that_of_timm(tiny_vit: nn.Module) -> None:
    expected = Preprocessing((1, 8, 8), (0.5,), (0.5,), "bicubic", 1.0, "center")
    assert tiny_vit.card.preprocessing == expected


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "resnet18"])
def test_timms_own_evaluation_transform_is_accepted(name: str) -> None:
    config = timm.models.get_pretrained_cfg(name).to_dict()
    data = timm.data.resolve_data_config(pretrained_cfg=config)
    model = nn.Module()
    model.pretrained_cfg = config
    check_transform(create_transform(**data), of_model(model))


def test_pipeline_that_does_what_the_model_expects_is_accepted() -> None:
    check_transform(_pipeline(), EXPECTED)


def test_gray_images_are_probed_as_gray() -> None:
    gray = Preprocessing((1, 8, 8), (0.0,), (1.0,), "bilinear", 1.0, "center")
    check_transform(T.Compose([T.Resize((8, 8)), T.ToTensor()]), gray)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 28}, r"expects input_size \(3, 32, 32\), .* uses \(3, 28, 28\); remove the data"),
        ({"mean": 0.4}, r"expects mean \(0\.5, 0\.5, 0\.5\), .* uses \(0\.4, 0\.4, 0\.4\)"),
        ({"std": 0.5}, r"expects std \(0\.25, .* uses \(0\.5, 0\.5, 0\.5\)"),
        ({"interpolation": "bilinear"}, r"expects interpolation bicubic, .* uses bilinear"),
        ({"resize": 32}, r"expects crop_pct 0\.8, .* uses 1\.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_setting_that_differs_is_refused_with_both_values(
    changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_transform(_pipeline(**changed), EXPECTED)


def test_missing_normalization_is_refused() -> None:
    bare = T.Compose([T.Resize(40, InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToTensor()])
    with pytest.raises(ValueError, match=r"expects mean .* uses \(0\.0, 0\.0, 0\.0\)"):
        check_transform(bare, EXPECTED)

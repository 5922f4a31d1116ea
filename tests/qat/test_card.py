"""The card: one value that stays with a model, and that any model can be given."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import timm
import torch
from torch import nn

import qat
from qat import Preprocessing, card_of
from qat.card import Card, expected_by
from qat.cost.count import cost
from qat.quantizers import LSQ
from tests.conftest import make_tiny_vit
from tests.qat.common import plan

PIXELS = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
KEEPING: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "to": lambda model: model.to("cpu", torch.float32),
    "compile": lambda model: torch.compile(model),  # type: ignore[return-value]
}


@pytest.mark.parametrize("way", KEEPING)
def test_card_stays_with_the_model(way: str) -> None:
    model = make_tiny_vit()
    qat.convert_(model, plan(), LSQ)
    assert card_of(KEEPING[way](model)) == card_of(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_card_says_the_dtype_that_the_weights_have_now(dtype: torch.dtype) -> None:
    assert card_of(make_tiny_vit().to(dtype)).dtype is dtype


def test_card_is_a_value_that_nobody_changes() -> None:
    with pytest.raises(FrozenInstanceError):
        make_tiny_vit().card.recipe = {}


@pytest.mark.parametrize("read", [card_of, expected_by])
def test_model_without_a_card_is_refused_with_both_ways_to_get_one(
    read: Callable[[nn.Module], object],
) -> None:
    with pytest.raises(ValueError, match=r"has no card.*qat\.timm_model.*qat\.adopt"):
        read(timm.create_model("test_vit"))


def test_card_that_says_nothing_of_images_is_refused_with_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"nothing about its images.*adopt\(model, preproc"):
        expected_by(qat.adopt(nn.Linear(2, 2)))


def test_adopted_timm_model_has_the_preprocessing_of_its_own_configuration() -> None:
    model = qat.adopt(timm.create_model("test_vit"))
    assert expected_by(model) == expected_by(qat.timm_model("test_vit"))


def test_adopted_model_of_ones_own_is_converted_calibrated_and_costed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(64, 5)).eval()
    qat.adopt(model, preprocessing=PIXELS, class_names=list("abcde"))
    qat.convert_(model, qat.Plan.uniform(4, 8), qat.quantizers.Affine)
    qat.calibrate(model, [torch.randn(2, 3, 16, 16)])
    assert cost(model).coverage_macs == 1.0
    assert model.card.class_names == tuple("abcde")


def test_converting_a_model_without_a_card_gives_it_one_that_says_what_was_done() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    conversion = qat.convert_(model, qat.Plan.uniform(4, 8), qat.quantizers.Affine)
    assert model.card == Card(conversion=conversion)

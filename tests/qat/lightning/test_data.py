"""Batches: preprocessed as the model expects, a function of seed, epoch and image only."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qat.card import expected_by
from qat.data.samples import EpochSampler, LazyLoader, Samples, ShareSampler
from qat.data.sources import digits, subset
from qat.lightning.data import VisionData
from qat.preprocessing import Preprocessing

GREY = Preprocessing((1, 8, 8), (0.5,), (0.5,), "bicubic", 1.0, "center")
AUGMENT = {"scale": [0.5, 1.0], "hflip": 0.5, "color_jitter": 0.0}


def _data(**settings: Any) -> VisionData:
    options: dict[str, Any] = {
        "train": subset(digits("train"), range(50)),
        "val": subset(digits("test"), range(30)),
        "batch_size": 16,
    }
    data = VisionData(**{**options, **settings})
    data.attach(GREY, 10)
    return data


def _batches(loader: Any) -> tuple[Tensor, Tensor]:
    images, labels, *_ = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def _pixels(source: Any) -> Tensor:
    arrays = [np.asarray(source[i][0], dtype=np.float32) for i in range(len(source))]
    return torch.from_numpy(np.stack(arrays))[:, None] / 255


def test_evaluation_images_come_once_in_order_normalized_as_the_model_expects() -> None:
    data = _data()
    images, labels = _batches(data.val_dataloader())
    assert torch.allclose(images, _pixels(data.val) / 0.5 - 1, atol=1e-6)
    assert labels.tolist() == [int(label) for label in data.val.labels]
    again, _ = _batches(data.test_dataloader())
    assert torch.equal(again, images)


def test_preprocessing_follows_the_model() -> None:
    data = _data()
    data.attach(
        Preprocessing((3, 16, 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "nearest", 1.0, "center"), 10
    )
    images, _ = _batches(data.val_dataloader())
    large = _pixels(data.val).repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    assert torch.allclose(images, (large - mean) / std, atol=1e-6)


def test_training_without_augmentation_sees_evaluation_preprocessing() -> None:
    data = _data(batch_size=50)
    images, labels = _batches(data.train_dataloader())
    pixels = _pixels(data.train) / 0.5 - 1
    found = {
        (tuple(i.flatten().tolist()), int(label)) for i, label in zip(images, labels, strict=True)
    }
    truth = zip(pixels, data.train.labels, strict=True)
    assert found == {(tuple(i.flatten().tolist()), int(label)) for i, label in truth}


def test_training_leaves_an_incomplete_batch_out() -> None:
    loader = _data().train_dataloader()
    assert len(loader) == 3
    assert [len(labels) for _, labels in loader] == [16, 16, 16]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmented_batches_depend_on_the_seed_and_not_on_the_number_of_workers(
    num_workers: int,
) -> None:
    expected, labels = _batches(_data(augment=AUGMENT).train_dataloader())
    torch.manual_seed(99)
    random.seed(99)
    found, found_labels = _batches(
        _data(augment=AUGMENT, num_workers=num_workers).train_dataloader()
    )
    assert torch.equal(found, expected) and torch.equal(found_labels, labels)
    other, _ = _batches(_data(augment=AUGMENT, seed=1).train_dataloader())
    assert not torch.equal(other, expected)


def test_drawing_batches_leaves_the_global_random_numbers_alone() -> None:
    # Python's own numbers cannot be compared under pytest, where beartype draws from them.
    state, array = torch.get_rng_state(), np.random.get_state()[1].tolist()
    _batches(_data(augment=AUGMENT).train_dataloader())
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == array


def test_image_is_augmented_otherwise_in_another_epoch_and_the_same_in_the_same_one() -> None:
    transform = _data(augment=AUGMENT)._train_transform(GREY)
    samples = Samples(digits("train"), transform, 0, "L")
    first, again, later = (samples[epoch, 7][0] for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(Samples(digits("train"), transform, 1, "L")[0, 7][0], first)


def test_epoch_is_a_permutation_that_another_epoch_and_seed_change() -> None:
    orders = [list(EpochSampler(50, s, lambda e=e: (e, 0))) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert [{epoch for epoch, _ in order} for order in orders] == [{0}, {1}, {0}]
    indices = [[index for _, index in order] for order in orders]
    assert all(sorted(found) == list(range(50)) for found in indices)
    assert indices[0] != indices[1] != indices[2] != indices[0]


def test_epoch_that_is_resumed_continues_behind_the_samples_done() -> None:
    whole = list(EpochSampler(50, 0, lambda: (3, 0)))
    assert list(EpochSampler(50, 0, lambda: (3, 32))) == whole[32:]


def test_shares_of_one_process_are_everything() -> None:
    assert list(ShareSampler(5)) == [0, 1, 2, 3, 4]
    assert len(ShareSampler(5)) == 5


def test_lazy_loader_asks_for_nothing_before_the_first_batch() -> None:
    asked = []

    def position() -> tuple[int, int]:
        asked.append(1)
        return 0, 0

    source = digits("train")
    samples = Samples(source, _data()._eval_transform(GREY), 0, "L")
    sampler = EpochSampler(len(source), 0, position)
    loader = LazyLoader(DataLoader(samples, batch_size=2, sampler=sampler))
    iterator = iter(loader)
    assert not asked
    assert len(next(iterator)[1]) == 2
    assert asked == [1]


def test_calibration_images_are_a_seeded_draw_preprocessed_as_in_evaluation() -> None:
    data = _data(augment=AUGMENT, num_calibration=20)
    batches = data.calibration_batches()
    assert [len(batch) for batch in batches] == [16, 4]
    train = {tuple(i.flatten().tolist()) for i in _pixels(data.train) / 0.5 - 1}
    drawn = {tuple(i.flatten().tolist()) for i in torch.cat(batches)}
    assert len(drawn) == 20 and drawn <= train
    again = _data(augment=AUGMENT, num_calibration=20).calibration_batches()
    assert torch.equal(torch.cat(again), torch.cat(batches))
    other = _data(num_calibration=20, seed=1).calibration_batches()
    assert not torch.equal(torch.cat(other), torch.cat(batches))


def test_calibration_with_more_images_than_there_are_uses_all() -> None:
    assert len(torch.cat(_data(num_calibration=500).calibration_batches())) == 50


def test_batch_larger_than_the_training_set_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 51 exceeds the 50 training images"):
        _data(batch_size=51).train_dataloader()


def test_command_that_needs_training_images_says_that_there_are_none() -> None:
    data = _data(train=None)
    for ask in (data.train_dataloader, data.calibration_batches):
        with pytest.raises(ValueError, match=r"data\.train is not set"):
            ask()
    assert len(_batches(data.val_dataloader())[1]) == 30


def test_batches_before_a_model_is_attached_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"call follow\(model\)"):
        VisionData(digits("test")).val_dataloader()


def test_unknown_augmentation_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"data\.augment: .*colour_jitter"):
        _data(augment={"colour_jitter": 0.4}).train_dataloader()


@pytest.mark.parametrize("key", ["mean", "std", "interpolation", "img_size"])
def test_setting_that_contradicts_the_model_is_refused_and_one_that_agrees_is_not(
    key: str, tiny_vit: nn.Module
) -> None:
    wrong = {"mean": [0.485], "std": [0.229], "interpolation": "bilinear", "img_size": 16}
    right = {"mean": [0.5], "std": [0.5], "interpolation": None, "img_size": 8}
    right["interpolation"] = expected_by(tiny_vit).interpolation
    VisionData(digits("test"), **{key: right[key]}).attach(expected_by(tiny_vit), 10)
    with pytest.raises(ValueError, match=rf"preprocessing mismatch.*remove the data\.{key}"):
        VisionData(digits("test"), **{key: wrong[key]}).attach(expected_by(tiny_vit), 10)


@pytest.mark.parametrize("part", ["train", "val"])
def test_number_of_classes_that_disagrees_is_refused(part: str) -> None:
    sources = {"train": digits("train"), "val": digits("test")}
    sources[part] = subset(sources[part], range(5))
    sources[part].num_classes, sources[part].class_names = 12, None
    with pytest.raises(ValueError, match="the model has 10 classes, the data has 12"):
        VisionData(**sources).attach(GREY, 10)

"""Images that cannot be read, and classes in another order, on the way to a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import qat
from qat.card import amend, card_of
from qat.data.samples import LabelledBatch
from qat.data.sources import Source, digits, subset
from qat.lightning.comparison import Comparison
from qat.lightning.data import VisionData
from qat.lightning.modules import Distillation
from qat.reading import Unreadable
from tests.conftest import make_tiny_vit

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be read:UserWarning")
NAMES = tuple("0123456789")


def partly(split: str, count: int, broken: Sequence[int]) -> Source:
    """The first digits of a split, some of them broken."""
    whole = subset(digits(split), range(count))

    def read(index: int) -> Any:
        if index in broken:
            raise OSError("rotten")
        return whole.read(index)

    return Source(read, whole.labels, 10, class_names=whole.class_names)


def data(train_broken: Sequence[int] = (), val_broken: Sequence[int] = (), **settings: Any) -> Any:
    """Forty digits to train on and thirty to judge by, for the tiny model."""
    options = {"train": partly("train", 40, train_broken), "batch_size": 8, "num_calibration": 8}
    made = VisionData(partly("test", 30, val_broken), **{**options, **settings})
    made.follow(make_tiny_vit())
    return made


def trainer(tmp_path: Path, **settings: Any) -> Trainer:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **settings}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, **options)


def told(found: Any) -> list[str]:
    return [str(warning.message) for warning in found if "cannot be read" in str(warning.message)]


def rows(batches: Any) -> set[tuple[float, ...]]:
    return {tuple(image.flatten().tolist()) for images, *_ in batches for image in images}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_left_out_of_training_and_named_once(num_workers: int) -> None:
    sound = rows(data(augment=None).train_dataloader())
    found = data([3, 21], num_workers=num_workers)
    with pytest.warns(UserWarning) as warnings:
        batches = [list(found.train_dataloader()) for _ in range(2)]
    for epoch in batches:
        assert sum(len(labels) for _, labels in epoch) == 38
        assert len(epoch) == 5 and rows(epoch) < sound
    assert sorted(told(warnings)) == [
        f"image {i} cannot be read: OSError: rotten; it is left out of training" for i in (21, 3)
    ]


def test_training_batch_of_which_nothing_can_be_read_ends_the_run() -> None:
    with pytest.raises(ValueError, match=r"none of the 8 images of a training batch.*rotten; rem"):
        list(data(range(40)).train_dataloader())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_count_as_wrong_and_keep_the_denominator(
    tmp_path: Path, num_workers: int
) -> None:
    model, broken = make_tiny_vit(), [0, 7, *range(8, 16)]  # 8 to 15 are a whole batch
    images, labels = data().evaluation_images(None)
    right = model(images).argmax(1) == labels
    right[broken] = False
    judged = data([], broken, num_workers=num_workers)
    module = Distillation(model)
    with pytest.warns(UserWarning, match="rotten; it counts as not answered"):
        found = trainer(tmp_path).validate(module, datamodule=judged, verbose=False)[0]
    assert found["val/top1"] == pytest.approx(float(right.float().mean()))
    assert (found["val/n_images"], found["val/n_refused"]) == (30, 10)
    comparison = Comparison(model, model)
    trainer(tmp_path).validate(comparison, datamodule=judged, verbose=False)
    items = comparison.items()
    assert items["top1"] == items["top1_float"] == pytest.approx(found["val/top1"])
    assert (items["agreement"], items["logit_error"]) == (1.0, 0.0)
    assert (items["n_images"], items["n_refused"]) == (30, 10)


def test_evaluation_of_which_nothing_can_be_read_ends_the_run(tmp_path: Path) -> None:
    comparison = Comparison(make_tiny_vit(), make_tiny_vit())
    trainer(tmp_path).validate(comparison, datamodule=data([], range(30)), verbose=False)
    with pytest.raises(ValueError, match="none of the 30 evaluation images can be read"):
        comparison.items()


def test_calibration_takes_the_next_image_of_the_draw_and_its_own_label() -> None:
    whole = data(num_calibration=9)
    first = whole.calibration_draw[2]
    found = data([first])
    expected = [index for index in whole.calibration_draw if index != first]
    with pytest.warns(UserWarning, match="rotten; another image is drawn to calibrate"):
        assert found.calibration_draw == expected
    assert found.calibration_labels().tolist() == [int(found.train.labels[i]) for i in expected]
    assert len(torch.cat(found.calibration_batches())) == 8
    with pytest.raises(ValueError, match="40 images: none can be read to calibrate"):
        data(range(40)).calibration_batches()


def test_broken_image_that_might_have_calibrated_is_still_evaluated_as_broken() -> None:
    first = data(train=None, calibrate_on="val").calibration_draw[0]
    found = data([], [first], train=None, calibrate_on="val")
    assert first not in found.calibration_draw
    refused = [fault for _, _, faults in found.val_dataloader() for fault in faults]
    assert refused == [f"image {first} cannot be read: OSError: rotten"]


def test_single_image_that_cannot_be_read_raises() -> None:
    with pytest.raises(Unreadable, match="image 3 cannot be read"):
        partly("train", 5, [3])[3]


def test_plain_pairs_are_batches_too(tmp_path: Path) -> None:
    images, labels = data().evaluation_images(None)
    pairs = DataLoader(list(zip(images, labels, strict=True)), batch_size=10)
    found = trainer(tmp_path).validate(Distillation(make_tiny_vit()), pairs, verbose=False)[0]
    assert (found["val/n_images"], found["val/n_refused"]) == (30, 0)
    assert LabelledBatch(images, labels).faults == ()


def turned(source: Source) -> Source:
    """The same images and classes, the classes in reverse order."""
    labels = [9 - int(label) for label in source.labels]
    return Source(source.read, labels, 10, class_names=source.class_names[::-1])  # type: ignore[index]


def labels_of(batches: Any) -> list[int]:
    return [int(label) for _, labels, *_ in batches for label in labels]


def test_same_classes_in_another_order_are_matched_by_name() -> None:
    sources = digits("test"), digits("train")
    truth = list(sources[0].labels)
    for model_names, val in ((None, turned(sources[0])), (NAMES, turned(sources[0]))):
        made, model = VisionData(val, sources[1]), make_tiny_vit()
        amend(model, class_names=model_names)
        made.follow(model)
        assert labels_of(made.val_dataloader()) == truth
        assert card_of(model).class_names == NAMES
    model = make_tiny_vit()
    amend(model, class_names=NAMES[::-1])
    made = VisionData(*sources)
    made.follow(model)
    assert labels_of(made.val_dataloader()) == [9 - label for label in truth]


def test_classes_of_other_names_are_refused_with_the_difference() -> None:
    other = digits("test")
    other.class_names = (*NAMES[:9], "nine")
    with pytest.raises(ValueError, match=r"data\.val has other classes.* has 'nine', it lacks '9'"):
        VisionData(other, digits("train")).follow(make_tiny_vit())
    model = make_tiny_vit()
    amend(model, class_names=(*NAMES[:9], "neuf"))
    with pytest.raises(ValueError, match=r"data\.train has other classes.* '9', it lacks 'neuf'"):
        VisionData(digits("test"), digits("train")).follow(model)


def test_validation_may_lack_classes_and_training_may_not() -> None:
    few = Source(digits("test").read, [0, 1], 2, class_names=("3", "7"))
    made = VisionData(few, digits("train"))
    made.follow(make_tiny_vit())
    assert labels_of(made.val_dataloader()) == [3, 7]
    model = make_tiny_vit()
    amend(model, class_names=NAMES)
    with pytest.raises(
        ValueError, match=r"data\.train .* lacks '0', '1', '2', '4', '5' and 3 more"
    ):
        VisionData(digits("test"), few).follow(model)


def test_class_names_of_the_data_go_into_the_checkpoint(tmp_path: Path) -> None:
    model = make_tiny_vit()
    data().follow(model)
    qat.save(model, tmp_path / "model.ckpt")
    assert card_of(qat.load(tmp_path / "model.ckpt")).class_names == NAMES


def saved(tmp_path: Path, names: tuple[str, ...] | None) -> str:
    model: nn.Module = make_tiny_vit()
    amend(model, class_names=names)
    qat.save(model, tmp_path / "teacher.ckpt")
    return str(tmp_path / "teacher.ckpt")


def test_student_has_the_classes_of_its_teacher_in_its_order(tmp_path: Path) -> None:
    student = make_tiny_vit()
    Distillation(student, saved(tmp_path, NAMES[::-1]))
    assert card_of(student).class_names == NAMES[::-1]
    amend(student, class_names=NAMES)
    with pytest.raises(ValueError, match="model and teacher disagree on class names"):
        Distillation(student, saved(tmp_path, NAMES[::-1]))


def test_batch_of_nothing_has_no_logits() -> None:
    from qat.lightning.answers import hits, logits_of

    logits: Tensor = logits_of(make_tiny_vit(), torch.empty(0))
    assert logits.shape == (0, 10)
    assert hits(logits, torch.empty(0).long(), 5, 3).tolist() == [0, 0, 0]


def test_hits_are_those_among_the_largest_logits() -> None:
    from qat.lightning.answers import hits

    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([1, 2])
    assert hits(logits, labels).tolist() == [0, 1]
    assert hits(logits, labels, 2, 1).tolist() == [1, 1, 0]

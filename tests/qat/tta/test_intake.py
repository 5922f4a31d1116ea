"""Goal R2: what is no batch of images is refused by a typed error, or taken in as documented."""

import numpy as np
import pytest
import torch
from torch import Tensor

from qat.preprocessing import Preprocessing
from qat.tta import Refused
from qat.tta.answer import Intake
from tests.qat.tta.common import adapter, noisy, same

GOOD = noisy()[0]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)

REFUSED: dict[str, tuple[object, str]] = {
    "none": (None, "type"),
    "list": (GOOD.tolist(), "type"),
    "array": (GOOD.numpy(), "type"),
    "text": ("images", "type"),
    "number": (1.0, "type"),
    "tuple of tensors": ((GOOD, GOOD), "type"),
    "array of objects": (np.array([object()]), "type"),
    **{str(dtype): (GOOD.to(dtype), "dtype") for dtype in INTEGERS},
    "complex": (GOOD.to(torch.complex64), "dtype"),
    "scalar": (torch.tensor(1.0), "rank"),
    "vector": (GOOD.flatten(), "rank"),
    "flat": (GOOD.flatten(1), "rank"),
    "one image": (GOOD[0], "rank"),
    "video": (GOOD[None], "rank"),
    "no channels": (GOOD[:, :0], "channels"),
    "three channels": (GOOD.repeat(1, 3, 1, 1), "channels"),
    "four channels": (GOOD.repeat(1, 4, 1, 1), "channels"),
    "channels last": (torch.zeros(2, 8, 8, 1), "channels"),
    "too small": (GOOD[:, :, :4, :4], "size"),
    "too large": (torch.zeros(2, 1, 16, 16), "size"),
    "not square": (torch.zeros(2, 1, 8, 16), "size"),
    "one pixel": (torch.zeros(2, 1, 1, 1), "size"),
    "no pixels": (torch.zeros(2, 1, 8, 0), "size"),
    "empty": (GOOD[:0], "empty"),
    "other device": (torch.zeros(2, 1, 8, 8, device="meta"), "device"),
}
FLAGGED: dict[str, tuple[Tensor, str]] = {
    "0 to 255": ((GOOD + 1) * 127.5, "magnitude"),
    "nan": (torch.full_like(GOOD, torch.nan), "nan"),
    "infinity": (torch.full_like(GOOD, torch.inf), "infinite"),
    "minus infinity": (torch.full_like(GOOD, -torch.inf), "infinite"),
    "1e30": (torch.full_like(GOOD, 1e30), "magnitude"),
    "overflow of conversion": (torch.full_like(GOOD, 1e300, dtype=torch.float64), "infinite"),
    "half overflow": (torch.full_like(GOOD, 6e4).half(), "magnitude"),
}
TAKEN: dict[str, Tensor] = {
    "float64": GOOD.double(),
    "half": GOOD.half(),
    "bfloat16": GOOD.bfloat16(),
    "one image in a batch": GOOD[:1],
    "not contiguous": GOOD.transpose(2, 3),
    "strided": noisy(size=16)[0][::2],
    "flipped": GOOD.flip(3),
    "broadcast": GOOD[:1].expand(8, -1, -1, -1),
    "requires grad": GOOD.clone().requires_grad_(),
    "channels last memory": GOOD.to(memory_format=torch.channels_last),
    "constant": torch.full_like(GOOD, 0.5),
    "subnormal": torch.full_like(GOOD, 1e-42),
    "zeros": torch.zeros_like(GOOD),
    "large batch": torch.cat(noisy()[:64]),
}


def test_the_catalogue_has_forty_kinds() -> None:
    assert len(REFUSED) + len(FLAGGED) + len(TAKEN) >= 40


@pytest.mark.parametrize("name", ["tent", "rotta"])
def test_what_is_no_batch_is_refused_with_its_code_and_changes_nothing(name: str) -> None:
    tested, control = adapter(name), adapter(name)
    for kind, (images, code) in REFUSED.items():
        before, counts = dict(tested.state), tested.counts
        with pytest.raises(Refused) as error:
            tested.adapt(images)
        assert error.value.code == code, kind
        assert same(dict(tested.state), before) and tested.counts == counts, kind
    for batch in noisy()[:8]:
        assert torch.equal(tested.adapt(batch).logits, control.adapt(batch).logits)


@pytest.mark.parametrize("kind", FLAGGED)
def test_rows_that_are_no_images_are_flagged_and_change_nothing(kind: str) -> None:
    images, reason = FLAGGED[kind]
    tested = adapter("tent")
    before = dict(tested.state)
    answer = tested.adapt(images)
    assert set(answer.refusals) <= {reason, None} and reason in answer.refusals
    refused = torch.tensor([why is not None for why in answer.refusals])
    assert answer.logits[refused].isnan().all() and answer.logits[~refused].isfinite().all()
    assert same(dict(tested.state), before) == bool(refused.all())
    assert tested.counts.refused == int(refused.sum())


@pytest.mark.parametrize("kind", TAKEN)
def test_unusual_batches_are_taken_in(kind: str) -> None:
    images = TAKEN[kind]
    tested, plain = adapter("tent"), adapter("tent")
    answer = tested.adapt(images)
    assert answer.logits.isfinite().all() and not any(answer.refusals)
    plain_answer = plain.adapt(images.detach().float().contiguous().clone())
    assert torch.equal(answer.logits, plain_answer.logits)
    assert not images.requires_grad or images.grad is None


@pytest.mark.parametrize(
    ("mean", "std", "limit"), [((0.5,), (0.5,), 2.0), ((0.485, 0.406), (0.229, 0.225), 5.28)]
)
def test_limit_is_twice_the_magnitude_of_black_or_white(
    mean: tuple[float, ...], std: tuple[float, ...], limit: float
) -> None:
    intake = Intake.of(Preprocessing((1, 8, 8), mean, std, "bicubic", 1.0, "center"))
    assert intake.limit == pytest.approx(limit, abs=0.005)
    edge = torch.full((2, 1, 8, 8), limit - 0.01)
    edge[1] = limit + 0.01
    assert intake.refusals(edge) == (None, "magnitude")

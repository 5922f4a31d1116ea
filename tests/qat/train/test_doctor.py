"""What counts as a fault, at numbers on both sides of each threshold."""

import pytest
import torch

from qat.quantizers import LSQ
from qat.spec import QuantSpec
from qat.train import doctor
from qat.train.doctor import Diagnosis


def test_zero_negative_and_dead_scales_are_counted_and_the_first_layer_is_named() -> None:
    starts = {"a": torch.full((3,), 0.5), "b": torch.tensor(2.0)}
    scales = {"a": torch.tensor([0.5, -0.1, 0.0]), "b": torch.tensor(1e-4)}
    found = doctor.signs_of_scales(scales, starts, lr=1e-2)
    assert found is not None
    assert found.layer == "a"
    assert "3 of 4" in found.evidence
    assert "1 of them negative" in found.evidence
    assert found.suggestion == "--model.optimizer.init_args.lr 0.001"
    assert doctor.signs_of_scales(starts, starts, lr=1e-2) is None


def test_clipping_is_judged_by_bits() -> None:
    assert doctor.saturation({"a": (4, 0.39), "b": (2, 0.79)}) is None
    found = doctor.saturation({"a": (4, 0.41), "b": (2, 0.9), "c": (8, 0.0)})
    assert found is not None
    assert found.layer == "b"
    assert found.evidence == "2 of 3 operands clip too many, up to 90%"


def test_clipping_before_training_is_of_the_start_and_later_of_the_learning_rate() -> None:
    start, later = (doctor.saturation({"a": (4, 0.9)}, lr) for lr in (None, 1e-2))
    assert start is not None
    assert later is not None
    assert start.suggestion.startswith("--init ")
    assert later.suggestion == "--model.optimizer.init_args.lr 0.001"


def test_clipped_share_is_that_outside_of_the_grid_by_more_than_half_a_step() -> None:
    quantizer = LSQ(QuantSpec(2), ())
    quantizer.scale.data.fill_(1.0)  # codes -2 to 1
    x = torch.tensor([-2.6, -2.4, -0.5, 0.0, 1.4, 1.6])
    assert doctor.clipped_share(quantizer, x) == pytest.approx(2 / 6)


def test_only_scales_that_decay_are_a_fault() -> None:
    assert doctor.decay_of_scales({"a": 0.0}) is None
    found = doctor.decay_of_scales({"a": 0.0, "b": 0.05})
    assert found is not None
    assert (found.layer, "1 of 2 by 0.05" in found.evidence) == ("b", True)


def test_an_average_may_be_a_tenth_worse() -> None:
    assert doctor.averaging(1.0, 1.1) is None
    assert doctor.averaging(1.0, 1.11) is not None


@pytest.mark.parametrize(
    ("losses", "suggestion"),
    [
        ([2.0, 2.0], None),  # too early to say
        ([2.0, 2.0, 1.95], None),
        ([2.0, 1.9, 2.2], None),
        ([2.0, 1.99, 1.98], "--model.optimizer.init_args.lr 0.003"),
        ([2.0, 2.5, 2.4], "--model.optimizer.init_args.lr 0.0001"),
    ],
)
def test_a_plateau_needs_three_epochs_without_a_fall(
    losses: list[float], suggestion: str | None
) -> None:
    found = doctor.plateau(losses, num_steps=30, lr=1e-3)
    assert (found and found.suggestion) == suggestion
    assert doctor.plateau(losses, num_steps=29, lr=1e-3) is None


@pytest.mark.parametrize(
    ("flips", "rates", "frozen"),
    [
        ([1e-3, 1e-4], [1.0, 1.0], False),
        ([1e-3, 1e-5], [1.0, 1.0], True),
        ([1e-3, 1e-5], [1.0, 0.2], False),  # flips fall with the learning rate
        ([1e-3, 0.0], [1.0, 0.05], False),  # at the end of the schedule they always stop
        ([1e-7], [1.0], True),
        ([], [], False),
        ([1e-7], [0.0], False),
    ],
)
def test_signs_are_frozen_where_flips_fall_faster_than_the_learning_rate(
    flips: list[float], rates: list[float], frozen: bool
) -> None:
    assert (doctor.frozen_signs(flips, rates, strength=1.0) is not None) is frozen
    assert doctor.frozen_signs(flips, rates, strength=0.0) is None


def test_a_diagnosis_is_one_line_with_cause_evidence_layer_and_flag() -> None:
    found = Diagnosis("fault", "the cause", "3 of 4", "blocks.0", "--flag 1")
    assert str(found) == "the cause: 3 of 4, first blocks.0; try --flag 1"
    assert found.items()["fault"] == "fault"

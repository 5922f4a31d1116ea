"""Protocols lay out every image in every domain, in the order and with the resets of suites."""

import numpy as np
import pytest

from qat.data.corruptions import CORRUPTIONS, Domain
from qat.data.protocols import (
    Arrival,
    CleanAfterShift,
    Continual,
    Correlated,
    Gradual,
    Mixed,
    Recurring,
    ResetEachShift,
    Schedule,
    StreamProtocol,
)

LABELS = np.arange(57) % 10
PAIR = ("fog", "snow")
ONE_BY_ONE = (Continual(PAIR), ResetEachShift(PAIR), Correlated(0.1, PAIR), Correlated(None, PAIR))
EVERY = (*ONE_BY_ONE, Gradual(PAIR), Mixed(PAIR), Recurring(3, PAIR), CleanAfterShift(PAIR))


def laid_out(protocol: StreamProtocol, batch_size: int = 10, seed: int = 0) -> Schedule:
    """The schedule over 57 images of ten classes."""
    return protocol.schedule(LABELS, batch_size, seed)


def segments(schedule: Schedule) -> list[tuple[str, int, int]]:
    """Runs of one domain: name, severity, number of images."""
    changes = np.flatnonzero(np.diff(schedule.domain_of)) + 1
    runs = np.split(schedule.domain_of, changes)
    domains = [schedule.domains[run[0]] for run in runs]
    return [(d.name, d.severity, len(run)) for d, run in zip(domains, runs, strict=True)]


def mean_classes(schedule: Schedule) -> float:
    """Mean number of different labels in a batch."""
    cuts = schedule.starts[1:-1]
    return float(np.mean([len(set(b)) for b in np.split(LABELS[schedule.indices], cuts)]))


@pytest.mark.parametrize("protocol", EVERY, ids=repr)
def test_every_image_comes_once_in_every_segment(protocol: StreamProtocol) -> None:
    schedule = laid_out(protocol)
    times = {Recurring: 3}.get(type(protocol), 1)
    for number, domain in enumerate(schedule.domains):
        seen = np.bincount(schedule.indices[schedule.domain_of == number], minlength=57)
        shared = 2 if domain == Domain("clean", 0) or type(protocol) is Gradual else times
        expected = 1 if domain.severity == 5 and type(protocol) is Gradual else shared
        assert (seen == expected).all(), domain


@pytest.mark.parametrize("protocol", EVERY, ids=repr)
def test_batches_cover_all_rows_and_cross_no_domain_unless_mixed(protocol: StreamProtocol) -> None:
    schedule = laid_out(protocol)
    sizes = np.diff(schedule.starts)
    assert schedule.starts[0] == 0
    assert schedule.starts[-1] == len(schedule.indices) == len(schedule.domain_of)
    assert sizes.min() >= 1
    assert sizes.max() == 10
    if not isinstance(protocol, Mixed):
        for first, end in zip(schedule.starts, schedule.starts[1:], strict=False):
            assert len(set(schedule.domain_of[first:end])) == 1


@pytest.mark.parametrize("protocol", EVERY, ids=repr)
def test_schedule_is_a_function_of_its_arguments_and_the_seed_matters(
    protocol: StreamProtocol,
) -> None:
    first, again, other = (laid_out(protocol, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.indices, again.indices)
    assert np.array_equal(first.domain_of, again.domain_of)
    assert not np.array_equal(first.indices, other.indices)


def test_continual_is_the_official_order_without_restart() -> None:
    schedule = laid_out(Continual())
    assert segments(schedule) == [(name, 5, 57) for name in CORRUPTIONS]
    assert schedule.restarts == frozenset()


def test_reset_each_shift_restarts_before_the_first_batch_of_each_corruption() -> None:
    schedule = laid_out(ResetEachShift(PAIR))
    assert schedule.restarts == {0, 6}  # 57 images are six batches of ten
    plain = laid_out(Continual(PAIR))
    assert np.array_equal(schedule.indices, plain.indices)


def test_gradual_severity_rises_and_falls() -> None:
    levels = [1, 2, 3, 4, 5, 4, 3, 2, 1]
    expected = [(name, level, 57) for name in PAIR for level in levels]
    assert segments(laid_out(Gradual(PAIR))) == expected


def test_recurring_repeats_the_laps_in_new_orders() -> None:
    schedule = laid_out(Recurring(3, PAIR))
    assert segments(schedule) == [(name, 5, 57) for _ in range(3) for name in PAIR]
    laps = schedule.indices.reshape(3, 2, 57)
    assert not np.array_equal(laps[0], laps[1])


def test_clean_images_follow_each_corruption() -> None:
    schedule = laid_out(CleanAfterShift(PAIR))
    expected = [run for name in PAIR for run in ((name, 5, 57), ("clean", 0, 57))]
    assert segments(schedule) == expected


def test_mixed_batches_hold_many_domains() -> None:
    schedule = laid_out(Mixed())
    names = [
        len(set(schedule.domain_of[a:b]))
        for a, b in zip(schedule.starts, schedule.starts[1:], strict=False)
    ]
    assert np.mean(names) > 6  # ten of fifteen at random give 7.5


def test_smaller_delta_correlates_labels_more_and_none_sorts_them() -> None:
    iid, weak, strong, sorted_ = (
        mean_classes(laid_out(protocol))
        for protocol in (
            Continual(PAIR),
            Correlated(10.0, PAIR),
            Correlated(0.05, PAIR),
            Correlated(None, PAIR),
        )
    )
    assert min(iid, weak) > strong + 1 > sorted_ + 1
    rows = laid_out(Correlated(None, PAIR)).indices[:57]
    assert np.array_equal(LABELS[rows], np.sort(LABELS))


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (lambda: Correlated(0.0), "delta must be positive, or null to sort by label; got 0.0"),
        (lambda: Correlated().schedule(np.arange(30), 10, 0), "no two of the 30 images share"),
        (lambda: Recurring(0), "laps must be at least 1, got 0"),
        (lambda: laid_out(Continual(())), "at least one corruption"),
        (lambda: laid_out(Gradual(())), "at least one corruption"),
        (lambda: laid_out(Continual(PAIR), batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: laid_out(Arrival(), batch_size=0), "batch_size must be at least 1, got 0"),
    ],
)
def test_settings_without_sense_are_refused(protocol, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        protocol()

"""Goal R12: under load no answer is lost, doubled or delayed for the sake of adapting."""

import pytest
import torch

from qat.tta import Desk, Outcome
from tests.qat.tta.common import adapter, noisy, same


def test_queue_is_bounded_and_what_it_declines_is_counted() -> None:
    desk = Desk(adapter("tent"), capacity=2)
    taken = [desk.take(number, noisy()[0]) for number in range(4)]
    assert taken == [True, True, False, False] and desk.num_declined == 2


def test_answer_in_a_hurry_is_the_one_before_the_step_and_adapts_nothing() -> None:
    hurried, whole = adapter("tent"), adapter("tent")
    before = dict(hurried.state)
    answer = hurried.adapt(noisy()[0], hurry=True)
    assert answer.outcome is Outcome.SKIPPED and answer.reason == "hurry"
    assert torch.equal(answer.logits, whole.adapt(noisy()[0]).logits)
    assert same(dict(hurried.state), before)


@pytest.mark.parametrize("patience", [0, 2])
def test_load_with_bursts_is_answered_once_each_in_order_with_bounded_delay(patience: int) -> None:
    """Virtual time: a step costs 3, an answer alone 1; batches come every 3.75, bursts of 5."""
    desk = Desk(adapter("tent"), capacity=16, patience=patience)
    arrivals = sorted([3.75 * i for i in range(60)] + [3.75 * i for i in (10, 30, 50)] * 4)
    clock, delays, order, upcoming = 0.0, [], [], list(enumerate(arrivals))
    batch = noisy()[0]
    while upcoming or desk.waiting:
        if not desk.waiting:
            clock = max(clock, upcoming[0][1])
        while upcoming and upcoming[0][1] <= clock:
            assert desk.take(upcoming[0], batch)
            upcoming.pop(0)
        found = desk.answer()
        assert found is not None
        (number, arrived), answer = found  # type: ignore[misc]
        clock += 3 if answer.outcome is Outcome.ADAPTED else 1
        order.append(number)
        delays.append(clock - arrived)
    assert order == list(range(len(arrivals)))
    counts = desk.adapter.counts
    assert counts.skipped > 0 and counts.adapted > 45
    delays.sort()
    assert delays[int(0.99 * len(delays))] <= 3 * delays[len(delays) // 2]
    assert desk.answer() is None and desk.num_declined == 0


def test_patience_beyond_the_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="patience must be 0 to capacity - 1"):
        Desk(adapter("tent"), capacity=2, patience=2)

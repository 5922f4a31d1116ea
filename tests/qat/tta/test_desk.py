"""Goal R12: under load no answer is lost, doubled or delayed for the sake of adapting."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from qat.tta import Adapter, Desk, Outcome, Source
from qat.tta.answer import State
from qat.tta.overlay import Overlay
from tests.qat.tta.common import adapter, noisy, same, shared


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


def test_batch_that_is_filled_anew_while_it_waits_is_answered_as_it_was() -> None:
    desk, control = Desk(adapter("tent")), adapter("tent")
    buffer = noisy()[0].clone()
    desk.take(1, buffer)
    buffer.fill_(torch.nan)
    found = desk.answer()
    assert found is not None and torch.equal(found[1].logits, control.adapt(noisy()[0]).logits)


@pytest.mark.parametrize(
    ("batch", "rows", "reason"),
    [
        (torch.zeros(3, 1, 9, 9), 3, "images have size"),
        (torch.zeros(0, 1, 8, 8), 0, "the batch is empty"),
        (torch.zeros(()), 0, "images must be"),
        ("no images", 0, "images must be a tensor, got str"),
        (None, 0, "images must be a tensor, got NoneType"),
    ],
    ids=["size", "empty", "number", "text", "nothing"],
)
def test_batch_that_is_refused_gets_its_ticket_back_with_the_reason(
    batch: object, rows: int, reason: str
) -> None:
    desk = Desk(adapter("tent"))
    desk.take("bad", batch)
    desk.take("good", noisy()[0])
    ticket, answer = desk.answer()  # type: ignore[misc]
    assert ticket == "bad" and reason in answer.reason and answer.outcome is Outcome.SKIPPED
    assert answer.logits.shape == (rows, 10) and answer.logits.isnan().all()
    assert len(answer.refusals) == rows and None not in answer.refusals
    ticket, answer = desk.answer()  # type: ignore[misc]
    assert ticket == "good" and answer.outcome is Outcome.ADAPTED


@dataclass(frozen=True)
class Broken(Source):
    """Answers nothing."""

    error: type[BaseException] = MemoryError

    def predict(self, on: Overlay, state: State, images: Tensor) -> Tensor:
        raise self.error("no memory")


def test_adapter_that_raises_gives_the_ticket_an_answer_with_the_reason() -> None:
    desk = Desk(Adapter(shared(), Broken()))
    assert desk.take(7, noisy()[0])
    ticket, answer = desk.answer()  # type: ignore[misc]
    assert ticket == 7 and answer.reason == "MemoryError: no memory"
    assert answer.outcome is Outcome.ROLLED_BACK and answer.logits.isnan().all()
    assert set(answer.refusals) == {"unanswerable"} and len(answer.refusals) == 8
    assert desk.answer() is None


def test_interrupt_leaves_the_ticket_in_its_place() -> None:
    desk = Desk(Adapter(shared(), Broken(KeyboardInterrupt)))
    desk.take(7, noisy()[0])
    desk.take(8, noisy()[1])
    with pytest.raises(KeyboardInterrupt):
        desk.answer()
    assert [ticket for ticket, _ in desk.waiting] == [7, 8]

"""A stream that comes at a fixed rate, with bursts, through a desk: delays, and what was skipped.

    python benchmarks/load.py runs/w4a4/model.ckpt --part ttaq_tent --minutes 30

Measures how many batches a second the adapter answers and adapts to, then sends batches at a share
of that by the clock; every `--burst_every` seconds five times as many for `--burst` seconds. A
thread delivers, the main thread answers. Delays run from delivery to answer. What the desk
declines because its queue is full is counted, never lost silently.
"""

import argparse
import threading
import time
from itertools import cycle
from statistics import quantiles

import torch
from bench import RECIPE, Bench

from qat.tta import Desk


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="model.ckpt of quantize or adapt")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--part", default="ttaq_tent", help="choices, see bench.choice")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--load", type=float, default=0.8, help="share of the measured capacity")
    parser.add_argument("--burst", type=float, default=10.0, help="seconds")
    parser.add_argument("--burst_every", type=float, default=600.0, help="seconds")
    parser.add_argument("--capacity", type=int, default=64, help="batches that may wait")
    return parser.parse_args()


def deliver(
    desk: Desk, batches: list[torch.Tensor], rate: float, given: argparse.Namespace
) -> tuple[threading.Thread, list[float]]:
    """A thread that hands in batches by the clock, their number as ticket; times of delivery."""
    times: list[float] = []
    source = cycle(batches)

    def work() -> None:
        started = due = time.monotonic()
        while due - started < 60 * given.minutes:
            time.sleep(max(0.0, due - time.monotonic()))
            times.append(time.monotonic())
            desk.take(len(times) - 1, next(source))
            second = (due - started) % given.burst_every
            in_burst = second > given.burst_every - given.burst
            due += 1 / (rate * (5 if in_burst else 1))

    return threading.Thread(target=work), times


def percentiles(delays: list[float]) -> str:
    cuts = quantiles(delays, n=100)
    return f"p50 {cuts[49]:.3f} s, p99 {cuts[98]:.3f} s, p99/p50 {cuts[98] / cuts[49]:.2f}"


def main() -> None:
    given = options()
    torch.set_num_threads(1)
    bench = Bench(given.model, given.recipe, batch_size=given.batch_size)
    stream = bench.stream
    batches = [stream[i].images for i in range(0, len(stream), max(1, len(stream) // 200))]
    adapter = bench.adapter(given.part)
    for batch in batches[:5]:
        adapter.adapt(batch)
    started = time.monotonic()
    for batch in batches:
        adapter.adapt(batch)
    rate = len(batches) / (time.monotonic() - started)
    desk = Desk(adapter, capacity=given.capacity)
    before = adapter.counts
    thread, times = deliver(desk, batches, given.load * rate, given)
    tickets, delays, longest = [], [], 0
    thread.start()
    while thread.is_alive() or desk.waiting:
        longest = max(longest, len(desk.waiting))
        found = desk.answer()
        if found is None:
            time.sleep(0.001)
            continue
        ticket, answer = found
        assert answer.logits.shape[0] > 0 and isinstance(ticket, int)
        tickets.append(ticket)
        delays.append(time.monotonic() - times[ticket])
    assert tickets == sorted(set(tickets)), "an answer was doubled or out of order"
    assert len(tickets) + desk.num_declined == len(times), "an answer was lost"
    counts = adapter.counts
    hurried = counts.skipped - before.skipped
    calm = [
        delay
        for delay, ticket in zip(delays, tickets, strict=True)
        if (times[ticket] - times[0] + given.burst) % given.burst_every > 3 * given.burst
    ]
    print(
        f"capacity {rate:.2f} batches/s of {given.batch_size}; {len(times)} batches in "
        f"{given.minutes:g} min; answered {len(tickets)}, declined {desk.num_declined}, "
        f"longest queue {longest} of {given.capacity}; adapted {counts.adapted - before.adapted}, "
        f"skipped {hurried}, rolled back {counts.rolled_back}"
    )
    print(f"all delays: {percentiles(delays)}")
    print(f"away from bursts: {percentiles(calm)}")


if __name__ == "__main__":
    main()

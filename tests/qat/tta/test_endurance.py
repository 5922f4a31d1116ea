"""Goal R11: a long stream costs neither memory nor files nor time nor accuracy."""

import gc
import os
import threading
from pathlib import Path

import pytest

from qat.tta import SGD, Adapter, Guard, Tent
from tests.qat.tta.common import labels_of, noisy, shared


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_twenty_thousand_images_leave_no_trace() -> None:
    tested = Adapter(shared(8), Tent(optimizer=SGD(lr=1e-5)), guard=Guard())
    batches, labels = noisy(size=16), labels_of(size=16)
    laps, resident, files, threads = [], [], [], []
    for _ in range(12):  # 12 laps of 1797 images
        wrong = 0
        for batch, truth in zip(batches, labels, strict=True):
            wrong += int((tested.adapt(batch).logits.argmax(1) != truth).sum())
        gc.collect()
        laps.append(wrong / 1797)
        resident.append(_resident())
        files.append(len(os.listdir("/proc/self/fd")))
        threads.append(threading.active_count())
    assert tested.counts.images == 12 * 1797 > 20_000
    assert resident[-1] < 1.01 * resident[2] and len(set(files[2:])) == len(set(threads[2:])) == 1
    assert laps[-1] <= laps[1] + 0.005

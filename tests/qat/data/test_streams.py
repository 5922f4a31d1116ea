"""Streams give the same batches however they are asked for; every image is accounted for."""

import numpy as np
import pytest
import torch
from PIL import Image

from qat.data.corrupted import Generated
from qat.data.protocols import Continual, StreamProtocol
from qat.data.sources import Source
from qat.data.streams import Stream, StreamBatch
from qat.preprocessing import Preprocessing

SIZE = 23
SMALL = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
PAIR = ("gaussian_noise", "contrast")


def source() -> Source:
    """Random 32-pixel images of five classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, 32, 32, 3), dtype=np.uint8)
    return Source(lambda i: Image.fromarray(pixels[i]), [i % 5 for i in range(SIZE)], 5)


def stream(protocol: StreamProtocol, seed: int = 0, batch_size: int = 6) -> Stream:
    """The source under a protocol."""
    return Stream(Generated(source(), "cifar"), protocol, SMALL, batch_size, seed)


def assert_same(found: StreamBatch, expected: StreamBatch) -> None:
    """Every field agrees, pixels bit for bit."""
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.indices, expected.indices)
    assert found.domains == expected.domains
    assert found.severities == expected.severities
    assert found.faults == expected.faults
    assert found.position == expected.position


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_resumed_anywhere_are_those_of_random_access(num_workers: int) -> None:
    whole = stream(Continual(PAIR))
    backwards = {i: whole[i] for i in reversed(range(len(whole)))}
    for start in (0, 3):
        resumed = list(stream(Continual(PAIR)).batches(start, num_workers))
        assert [batch.position for batch in resumed] == list(range(start, len(whole)))
        for batch in resumed:
            assert_same(batch, backwards[batch.position])

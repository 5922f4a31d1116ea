"""Streams give the same batches however they are asked for; every image is accounted for."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from qat.data.corrupted import Generated
from qat.data.corruptions import CORRUPTIONS, HELD_OUT, Domain
from qat.data.protocols import (
    CleanAfterShift,
    Continual,
    Correlated,
    Gradual,
    Mixed,
    Recurring,
    ResetEachShift,
    StreamProtocol,
)
from qat.data.sources import Source, subset
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


def test_pixels_depend_neither_on_order_batch_size_nor_subset() -> None:
    """Of an image in a domain, whichever stream asks for it."""
    seen: dict[tuple[int, str], torch.Tensor] = {}
    part = subset(source(), [20, 3, 11, 7])
    origin = {0: 20, 1: 3, 2: 11, 3: 7}
    for protocol in (Continual(PAIR), Mixed(PAIR), Correlated(None, PAIR), Recurring(2, PAIR)):
        for batch_size, seed in ((6, 0), (23, 4)):
            for batch in stream(protocol, seed, batch_size).batches():
                for index, name, pixels in zip(
                    batch.indices.tolist(), batch.domains, batch.images, strict=True
                ):
                    assert torch.equal(seen.setdefault((index, name), pixels), pixels)
    assert len(seen) == SIZE * len(PAIR)
    for batch in Stream(Generated(part, "cifar"), Continual(PAIR), SMALL, 4).batches():
        for index, name, pixels in zip(
            batch.indices.tolist(), batch.domains, batch.images, strict=True
        ):
            assert torch.equal(seen[origin[index], name], pixels)


def test_pixels_do_not_depend_on_the_number_of_threads() -> None:
    images = Generated(source(), "imagenet")
    before = torch.get_num_threads(), cv2.getNumThreads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            cv2.setNumThreads(threads)
            names = (*CORRUPTIONS, *HELD_OUT)
            found.append([np.asarray(images.image(1, Domain(name, 5))) for name in names])
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
    for one, several in zip(*found, strict=True):
        assert np.array_equal(one, several)


def test_labels_and_indices_are_those_of_the_source() -> None:
    for batch in stream(Mixed(PAIR)).batches():
        assert batch.labels.tolist() == [i % 5 for i in batch.indices.tolist()]
        assert batch.severities == (5,) * len(batch.domains)


def test_num_images_draws_the_same_images_for_every_domain_and_protocol() -> None:
    def drawn(protocol: StreamProtocol, seed: int) -> list[int]:
        short = Stream(Generated(source(), "cifar"), protocol, SMALL, 50, seed, num_images=9)
        return [sorted(batch.indices.tolist()) for batch in short.batches()]

    first, second = drawn(Continual(PAIR), 0)
    assert first == second == drawn(ResetEachShift(PAIR), 0)[0]
    assert len(set(first)) == 9
    assert first != drawn(Continual(PAIR), 1)[0]
    for wrong in (0, SIZE + 1):
        with pytest.raises(ValueError, match=f"num_images must be 1 to {SIZE}"):
            Stream(Generated(source()), Continual(PAIR), SMALL, num_images=wrong)


def test_clean_images_are_those_of_the_models_own_preprocessing() -> None:
    batch = stream(Continual(("clean",)))[0]
    for index, pixels in zip(batch.indices.tolist(), batch.images, strict=True):
        expected = torch.from_numpy(np.array(source()[index][0])).permute(2, 0, 1) / 127.5 - 1
        assert torch.allclose(pixels, expected, atol=1e-6)
    assert batch.domains == ("clean",) * 6
    assert batch.severities == (0,) * 6


def test_crops_of_imagenet_style_are_not_cropped_again() -> None:
    white = Image.new("RGB", (320, 256))
    white.paste((255, 255, 255), (48, 16, 272, 240))  # the centre, which imagenet style crops
    large = Source(lambda i: white, [0], 1)
    expects = Preprocessing((3, 224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")
    image = Stream(Generated(large), Continual(("clean",)), expects)[0].images[0]
    assert torch.equal(image, torch.ones(3, 224, 224))


def test_restarts_and_domains_are_those_of_the_protocol() -> None:
    resetting = stream(ResetEachShift(PAIR))
    assert resetting.domains == list(PAIR)
    assert resetting.restarts == {0, 4}
    assert stream(CleanAfterShift(PAIR)).domains == ["gaussian_noise", "clean", "contrast"]
    assert stream(Gradual(PAIR)).domains == list(PAIR)


def test_unknown_corruption_is_refused_before_the_first_batch() -> None:
    with pytest.raises(ValueError, match="no corruption 'rain'"):
        stream(Continual(("rain",)))
    with pytest.raises(IndexError, match="batches 0 to 7, not 8"):
        stream(Continual(PAIR))[8]

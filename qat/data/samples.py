"""Samples that depend on the seed, the epoch and the image only.

Which images come when, and how each is augmented, is a function of (seed, epoch, index): the same
for any number of workers and after a resume at any batch. The sampler therefore yields keys
(epoch, index), and the data set seeds the random generators anew for every augmented image.
"""

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from qat.data.sources import Source
from qat.reading import Refusals, Unreadable

Key = tuple[int, int]
Position = Callable[[], tuple[int, int]]
"""Where training is: the epoch, and how many samples of it each process has seen."""


class LabelledBatch(NamedTuple):
    """The images of a batch that could be read, and why the others could not.

    Attributes:
        images: N preprocessed images; of no shape where there are none.
        labels: (N,) class indices.
        faults: The reason for each image that is not among them.
    """

    images: Tensor
    labels: Tensor
    faults: tuple[str, ...] = ()


class Samples(Dataset[tuple[Tensor, int]]):
    """Transformed images of a source, by index or by key (epoch, index).

    A single image that cannot be read raises `Unreadable`; in a batch it stands as that error, so
    that it comes to the main process from any worker.

    Args:
        source: Labelled images.
        transform: From PIL image to tensor.
        seed: With the key, seeds the random generators of the transform.
        mode: PIL mode images are converted to, `RGB` or `L`.
    """

    def __init__(
        self, source: Source, transform: Callable[[Any], Tensor], seed: int, mode: str
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.mode = mode

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | Key) -> tuple[Tensor, int]:
        if not isinstance(key, tuple):
            image, label = self.source[key]
            return self.transform(image.convert(self.mode)), label
        epoch, index = key
        image, label = self.source[index]
        with _seeded(self.seed, epoch, index):
            return self.transform(image.convert(self.mode)), label

    def __getitems__(self, keys: Sequence[int | Key]) -> list[tuple[Tensor, int] | Unreadable]:
        return [self._or_fault(key) for key in keys]

    def _or_fault(self, key: int | Key) -> tuple[Tensor, int] | Unreadable:
        try:
            return self[key]
        except Unreadable as error:
            return Unreadable(str(error))  # without its cause, which may not cross processes


def collate(rows: Sequence[tuple[Tensor, int] | Unreadable]) -> LabelledBatch:
    """A batch of what `Samples` gives."""
    faults = tuple(str(row) for row in rows if isinstance(row, Unreadable))
    good = [row for row in rows if not isinstance(row, Unreadable)]
    images, labels = default_collate(good) if good else (torch.empty(0), torch.empty(0).long())
    return LabelledBatch(images, labels, faults)


def readable_draw(source: Source, count: int, seed: int, refusals: Refusals) -> list[int]:
    """The first images of a random order that can be read, at most `count`; others are refused.

    Raises:
        ValueError: If none can be read.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(source), generator=generator).tolist()

    def is_readable(index: int) -> bool:
        try:
            source.image(index)
        except Unreadable as error:
            refusals.add([str(error)])
            return False
        return True

    draw = list(islice(filter(is_readable, order), count))
    if not draw:
        raise ValueError(
            f"num_calibration {count} of {len(source)} images: none can be read to calibrate"
        )
    return draw


class EpochSampler(Sampler[Key]):
    """Keys of one epoch in random order, from where training is.

    In a distributed run each process gets its share; the last images are left out where the shares
    would be uneven.

    Args:
        size: Number of images.
        seed: With the epoch, seeds the order.
        position: Asked at the start of each pass.
    """

    def __init__(self, size: int, seed: int, position: Position) -> None:
        self.size = size
        self.seed = seed
        self.position = position

    def __len__(self) -> int:
        return self.size // _world()[1]

    def __iter__(self) -> Iterator[Key]:
        epoch, done = self.position()
        rank, world = _world()
        order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
        for index in order[rank : len(self) * world : world][done:]:
            yield epoch, int(index)


class ShareSampler(Sampler[int]):
    """Indices in order; in a distributed run every process's share, without repetition.

    Args:
        size: Number of images.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        rank, world = _world()
        return len(range(rank, self.size, world))

    def __iter__(self) -> Iterator[int]:
        rank, world = _world()
        return iter(range(rank, self.size, world))


class LazyLoader:
    """A data loader that does nothing before the first batch is asked for.

    Lightning makes an iterator before it has restored the epoch of a run that it resumes; workers
    that started then would ask the sampler for the wrong one.

    Args:
        loader: The loader.
        receive: What becomes of each batch, in the main process.
    """

    def __init__(
        self, loader: DataLoader[Any], receive: Callable[[Any], Any] = lambda batch: batch
    ) -> None:
        self.loader, self.receive = loader, receive

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        yield from map(self.receive, self.loader)


def leave_interrupts(worker: int) -> None:
    """Let a process that loads images leave Ctrl-C to the one that it works for, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _seeded(*words: int) -> Iterator[None]:
    """Seed the global generators within the block, and restore them after it."""
    seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


def _world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

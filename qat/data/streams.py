"""Streams of corrupted images: batches by number, the same however they are asked for.

Batch `i` is a function of (images, protocol, batch size, seed, i) alone: neither order, workers,
threads nor a resumed run change a pixel of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader

from qat.data.classes import ClassNames, relabelled
from qat.data.corrupted import CorruptedImages
from qat.data.protocols import StreamProtocol
from qat.data.samples import leave_interrupts
from qat.preprocessing import Preprocessing
from qat.reading import Unreadable


@dataclass(frozen=True, eq=False)
class StreamBatch:
    """A batch of N images, preprocessed for the model.

    Attributes:
        images: The images, float32; the row of an image that cannot be read is all NaN.
        labels: Class of each; for scoring only, never given to a method.
        indices: Position of each in the data set.
        domains: Corruption of each, `clean` for none.
        severities: Severity of each, 1 to 5, 0 for none.
        faults: For each that cannot be read the reason, else None.
        position: Number of this batch in the stream, from 0.
    """

    images: Float[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]
    indices: Int64[Tensor, " n"]
    domains: tuple[str, ...]
    severities: tuple[int, ...]
    faults: tuple[str | None, ...]
    position: int


class Stream:
    """Images under a protocol.

    No file is ever replaced by another or left out: one that cannot be read is a row of NaN with
    its reason in `StreamBatch.faults`, so that it is counted, and can only be refused.

    Args:
        images: Corrupted images by index and domain.
        protocol: Lays out which come when.
        preprocessing: What the model expects.
        batch_size: Images a batch.
        seed: Seeds the order of the images, and the draw of `num_images`.
        num_images: Images in each domain, the same random draw in all; None takes every one.
        class_names: Class names of the model; labels follow them where the images have names too.

    Raises:
        ValueError: If there are fewer images, or the protocol asks for a corruption or severity
            that they are not available in; or if the images have other classes than the model.
    """

    def __init__(
        self,
        images: CorruptedImages,
        protocol: StreamProtocol,
        preprocessing: Preprocessing,
        batch_size: int = 64,
        seed: int = 0,
        num_images: int | None = None,
        class_names: ClassNames | None = None,
    ) -> None:
        self.source = images
        labels = relabelled(images.labels, images.class_names, class_names, "the stream")
        self.labels = np.asarray(labels, dtype=np.int64)
        self.chosen = _draw(len(self.labels), num_images, seed)
        self.schedule = protocol.schedule(self.labels[self.chosen], batch_size, seed)
        for domain in self.schedule.domains:
            images.require(domain)
        self.shape = preprocessing.input_size
        self.transform = _transform(preprocessing, images.cropped)

    @property
    def domains(self) -> list[str]:
        """Names of the corruptions, in the order in which they first come."""
        return list(dict.fromkeys(domain.name for domain in self.schedule.domains))

    @property
    def restarts(self) -> frozenset[int]:
        """Positions before which the protocol resets the method."""
        return self.schedule.restarts

    @property
    def labelled(self) -> bool:
        """Whether the classes of the images are known."""
        return self.source.num_classes > 0

    def file(self, index: int) -> str:
        """What an image of the data set is called."""
        return self.source.files[index] if self.source.files else f"image {index}"

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.schedule.starts) - 1

    def __getitem__(self, position: int) -> StreamBatch:
        if not 0 <= position < len(self):
            raise IndexError(f"the stream has batches 0 to {len(self) - 1}, not {position}")
        rows = slice(*self.schedule.starts[position : position + 2])
        indices = self.chosen[self.schedule.indices[rows]]
        domains = [self.schedule.domains[number] for number in self.schedule.domain_of[rows]]
        images = torch.full((len(indices), *self.shape), torch.nan)
        faults: list[str | None] = [None] * len(indices)
        for row, (index, domain) in enumerate(zip(indices, domains, strict=True)):
            try:
                images[row] = self.transform(self.source.image(int(index), domain))
            except Unreadable as error:
                faults[row] = str(error)
        return StreamBatch(
            images=images,
            labels=torch.from_numpy(self.labels[indices]),
            indices=torch.from_numpy(indices),
            domains=tuple(domain.name for domain in domains),
            severities=tuple(domain.severity for domain in domains),
            faults=tuple(faults),
            position=position,
        )

    def batches(self, start: int = 0, num_workers: int = 0) -> Iterator[StreamBatch]:
        """The batches from `start` on, in order, made by `num_workers` processes ahead of time."""
        loader: DataLoader[StreamBatch] = DataLoader(
            self,  # type: ignore[arg-type]
            batch_size=None,
            sampler=range(start, len(self)),
            num_workers=num_workers,
            worker_init_fn=leave_interrupts,
            # Its own generator, so that making an iterator draws nothing from the global one.
            generator=torch.Generator(),
        )
        return iter(loader)


def _draw(size: int, num_images: int | None, seed: int) -> np.ndarray:
    if num_images is None:
        return np.arange(size)
    if not 1 <= num_images <= size:
        raise ValueError(f"num_images must be 1 to {size}, the size of the data; got {num_images}")
    return np.sort(np.random.default_rng((seed, size)).permutation(size)[:num_images])


def _transform(preprocessing: Preprocessing, cropped: bool) -> Callable[[Image.Image], Tensor]:
    """From PIL image to tensor; an image that is a crop already is not cropped again."""
    settings: dict[str, Any] = preprocessing.to_dict() | ({"crop_pct": 1.0} if cropped else {})
    mode = "RGB" if preprocessing.input_size[0] == 3 else "L"
    steps: Any = create_transform(**settings)
    return lambda image: steps(image.convert(mode))

"""Corrupted images by index and domain."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from qat.data.classes import ClassNames
from qat.data.corruptions import Domain, corrupt, require
from qat.data.sources import Source


@runtime_checkable
class CorruptedImages(Protocol):
    """Labelled images, each under every corruption."""

    @property
    def labels(self) -> Sequence[int] | np.ndarray:
        """Class of each image."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes of the task."""
        ...

    @property
    def class_names(self) -> ClassNames | None:
        """Name of each class; None where they have none."""
        ...

    @property
    def files(self) -> Sequence[str] | None:
        """Name of each image for people; None where they have none."""
        ...

    @property
    def cropped(self) -> bool:
        """Whether the images are crops already, which the model's own crop would cut again."""
        ...

    def require(self, domain: Domain) -> None:
        """Raise ValueError if the images are not available in a domain."""
        ...

    def image(self, index: int, domain: Domain) -> Image.Image:
        """An image in a domain; raises `Unreadable` if its file is broken."""
        ...


@dataclass(frozen=True)
class Generated:
    """Images of any source, as they are or corrupted on the fly.

    Attributes:
        source: Clean images.
        style: `imagenet`: images are resized to 256, cropped to 224, corrupted with the parameters
            of ImageNet-C and saved as JPEG of quality 85, as those distributed were. `cifar`: they
            keep their size, take the parameters of CIFAR-10-C, and are not saved. None: they stay
            as they are.
        seed: Seeds the corruptions, with the image's id.
    """

    source: Source
    style: Literal["imagenet", "cifar"] | None = "imagenet"
    seed: int = 0

    @property
    def labels(self) -> Sequence[int] | np.ndarray:
        """Class of each image."""
        return self.source.labels

    @property
    def num_classes(self) -> int:
        """Number of classes of the task."""
        return self.source.num_classes

    @property
    def class_names(self) -> ClassNames | None:
        """Name of each class; None where they have none."""
        return self.source.class_names

    @property
    def files(self) -> Sequence[str] | None:
        """Name of each image for people; None where they have none."""
        return self.source.files

    @property
    def cropped(self) -> bool:
        """Whether the images are crops already."""
        return self.style == "imagenet"

    def require(self, domain: Domain) -> None:
        """Raise ValueError if there is no such corruption or severity."""
        if domain.severity and self.style is None:
            raise ValueError(f"the images come as they are, without {domain.name}")
        require(domain)

    def image(self, index: int, domain: Domain) -> Image.Image:
        """An image in a domain; raises `Unreadable` if its file is broken."""
        image = self.source.image(index)
        if self.style is None:
            return image
        image = image.convert("RGB")
        if self.style == "imagenet":
            image = imagenet_crop(image)
        if domain.severity == 0:
            return image
        pixels = corrupt(np.asarray(image), domain, self.style, (self.seed, self.source.ids[index]))
        return Image.fromarray(pixels)


def imagenet_crop(image: Image.Image) -> Image.Image:
    """Shorter side to 256 pixels, then the central 224."""
    width, height = image.size
    short = min(width, height)
    size = (int(256 * width / short), int(256 * height / short))
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    return image.crop((left, top, left + 224, top + 224))

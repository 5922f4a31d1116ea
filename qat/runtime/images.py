"""Preprocessing of images as the packed model expects it: resize, crop, normalize, with Pillow."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

LARGEST_RESIZE = 4
"""Side of the resized image over that of the crop, at most."""


@dataclass(frozen=True)
class Images:
    """Preprocessing of one model.

    Attributes:
        size: Channels, height and width in pixels.
        mean: Subtracted from pixels in [0, 1], one value a channel.
        std: Divided by after that, one value a channel.
        interpolation: Name of Pillow's resampling filter, in lower case.
        crop_pct: Side of the crop as a fraction of the resized image.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    @staticmethod
    def of_card(card: Mapping[str, Any], size: tuple[int, int, int]) -> "Images":
        """The preprocessing that a card states.

        Raises:
            ValueError: If it states none that this runtime knows.
        """
        found = card.get("preprocessing")
        try:
            assert isinstance(found, dict)
            channels = size[0]
            mean, std = (tuple(float(v) for v in found[key]) for key in ("mean", "std"))
            crop_pct = float(found["crop_pct"])
            assert len(mean) == len(std) == channels and all(std)
            assert tuple(found["input_size"]) == size
            assert 1 / LARGEST_RESIZE <= crop_pct <= 1
            assert found["crop_mode"] == "center"
            Image.Resampling[found["interpolation"].upper()]
        except (AssertionError, KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f"the card states no preprocessing that this runtime knows: {str(found)[:200]}"
            ) from None
        return Images(size, mean, std, found["interpolation"], crop_pct)

    def prepare(self, image: Image.Image) -> np.ndarray:
        """The image as float32 (channels, height, width)."""
        channels, height, width = self.size
        image = image.convert("RGB" if channels == 3 else "L")
        image = self._cropped(self._resized(image))
        pixels = np.asarray(image, np.float32).reshape(height, width, channels) / np.float32(255)
        pixels = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _resized(self, image: Image.Image) -> Image.Image:
        """The smallest image of the same shape that covers the crop's sides over `crop_pct`."""
        height, width = (math.floor(side / self.crop_pct) for side in self.size[1:])
        if height == width:
            shorter = min(image.size)
            sides = int(width * image.width / shorter), int(width * image.height / shorter)
        else:
            ratio = min(image.height / height, image.width / width)
            sides = round(image.width / ratio), round(image.height / ratio)
        if sides == image.size:
            return image
        return image.resize(sides, Image.Resampling[self.interpolation.upper()])

    def _cropped(self, image: Image.Image) -> Image.Image:
        """The centre of the image."""
        height, width = self.size[1:]
        left = round((image.size[0] - width) / 2.0)
        top = round((image.size[1] - height) / 2.0)
        return image.crop((left, top, left + width, top + height))

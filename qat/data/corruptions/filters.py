"""Filters that several corruptions share: Gaussian, motion, zoom into the centre.

They take float32 images (H, W) or (H, W, 3).
"""

import math
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch.nn import functional as F

TRUNCATE = 4.0


def gaussian_kernel(sigma: float, truncate: float = TRUNCATE) -> np.ndarray:
    """Weights of a Gaussian cut off at `truncate` deviations."""
    radius = int(truncate * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * np.square(offsets / sigma)) if radius else np.ones(1)
    return weights / weights.sum()


def gaussian(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian filter; beyond the border the nearest pixel repeats."""
    kernel = gaussian_kernel(sigma).astype(np.float32)
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


def motion(image: np.ndarray, radius: float, sigma: float, angle: float) -> np.ndarray:
    """Half a Gaussian of `2 radius + 1` pixels along a line at `angle` degrees.

    As ImageMagick does it: the line is rasterised to whole pixels and y points down; beyond the
    border the nearest pixel repeats.
    """
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-0.5 * np.square(steps / sigma))
    weights /= weights.sum()
    columns = np.ceil(steps * math.cos(math.radians(angle)) - 0.5).astype(int)
    rows = np.ceil(steps * math.sin(math.radians(angle)) - 0.5).astype(int)
    top, left = max(0, -rows.min()), max(0, -columns.min())
    bottom, right = max(0, rows.max()), max(0, columns.max())
    padded = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_REPLICATE)
    height, width = image.shape[:2]
    total = np.zeros_like(image)
    for row, column, weight in zip(rows + top, columns + left, weights, strict=True):
        total = cv2.scaleAdd(padded[row : row + height, column : column + width], weight, total)
    return total


def zoom_in(image: torch.Tensor, factor: float) -> torch.Tensor:
    """The centre of an image (C, H, W), enlarged to the whole, bilinear.

    The corners of the enlarged crop lie on those of the crop, whose side is rounded up.
    """
    height, width = image.shape[-2:]
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - rows) // 2, (width - columns) // 2
    crop = image[None, :, top : top + rows, left : left + columns]
    size = (round(rows * factor), round(columns * factor))
    large = F.interpolate(crop, size, mode="bilinear", align_corners=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[:, top : top + height, left : left + width]


@lru_cache(maxsize=64)
def reflected_response(sigma: float, truncate: float, size: int) -> np.ndarray:
    """Response of a truncated Gaussian on the cosines that `size` reflected pixels are made of.

    A symmetric filter on a signal that is reflected at its borders is a product in the discrete
    cosine transform, exactly, however far it reaches.
    """
    kernel = gaussian_kernel(sigma, truncate)
    radius = len(kernel) // 2
    frequencies = np.pi * np.arange(size) / size
    cosines = np.cos(np.outer(frequencies, np.arange(1, radius + 1)))
    return (kernel[radius] + 2 * cosines @ kernel[radius + 1 :]).astype(np.float32)

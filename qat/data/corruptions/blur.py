"""Blur: defocus, glass, motion, zoom and Gaussian.

Every function takes an image (H, W, 3) uint8, the parameters of its severity and a generator, and
returns values from 0 to 255, not yet clipped or cut to integers.
"""

from functools import lru_cache

import cv2
import numpy as np
import torch

from qat.data.corruptions.filters import gaussian, motion, zoom_in


def defocus_blur(
    image: np.ndarray, radius: float, alias: float, generator: np.random.Generator
) -> np.ndarray:
    """Filtered with a disk, its edge smoothed by a Gaussian of deviation `alias`."""
    return cv2.filter2D(image.astype(np.float32), -1, _disk(radius, alias))


def glass_blur(
    image: np.ndarray, sigma: float, reach: int, repeats: int, generator: np.random.Generator
) -> np.ndarray:
    """Pixels take the place of near ones, between two Gaussian filters."""
    blurred = gaussian(image.astype(np.float32), sigma).astype(np.uint8)
    height, width = image.shape[:2]
    source = np.arange(height * width)
    for _ in range(repeats):
        source = source[_scatter(height, width, reach, generator)]
    moved = blurred.reshape(-1, 3)[source].reshape(image.shape)
    return gaussian(moved.astype(np.float32), sigma)


def motion_blur(
    image: np.ndarray, radius: float, sigma: float, generator: np.random.Generator
) -> np.ndarray:
    """Moved along a line between -45 and 45 degrees."""
    angle = generator.uniform(-45, 45)
    return motion(image.astype(np.float32), radius, sigma, angle)


def zoom_blur(
    image: np.ndarray, stop: float, step: float, generator: np.random.Generator
) -> np.ndarray:
    """The mean of the image and of enlargements of its centre from 1 up to `stop`."""
    x = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1).contiguous()
    factors = np.arange(1, stop, step)
    total = x.clone()
    for factor in factors:
        total += zoom_in(x, float(factor))
    return (total / (len(factors) + 1)).permute(1, 2, 0).numpy()


def gaussian_blur(image: np.ndarray, sigma: float, generator: np.random.Generator) -> np.ndarray:
    """A Gaussian filter."""
    return gaussian(image.astype(np.float32), sigma)


@lru_cache(maxsize=16)
def _disk(radius: float, alias: float) -> np.ndarray:
    """A disk of sum 1 on 17 x 17 pixels, or as many as it needs."""
    reach = 8 if radius <= 8 else int(radius)
    offsets = np.square(np.arange(-reach, reach + 1))
    inside = (offsets[:, None] + offsets <= radius**2).astype(np.float32)
    side = 3 if radius <= 8 else 5
    return cv2.GaussianBlur(inside / inside.sum(), (side, side), alias)


def _scatter(height: int, width: int, reach: int, generator: np.random.Generator) -> np.ndarray:
    """Which pixel each pixel takes its value from, numbered by rows; the borders stay.

    From the last pixel to the first, each copies what a near one holds by then: a copy, not the
    exchange one would expect of the original. Where that one was visited before, it holds what it
    copied itself, and so on: such chains are followed all at once, by doubling.
    """
    rows = np.arange(height - reach, reach, -1)
    columns = np.arange(width - reach, reach, -1)
    offsets = generator.integers(-reach, reach, (len(rows), len(columns), 2))
    here = rows[:, None] * width + columns
    there = here + offsets[..., 1] * width + offsets[..., 0]
    taken = np.arange(height * width)
    taken[here] = there
    visited = np.zeros(height * width, dtype=bool)
    visited[here] = True
    # A pixel leads on to the one it copies, if that was visited earlier; else it ends the chain.
    chained = visited[there] & (there > here)
    following = np.arange(height * width)
    following[here[chained]] = there[chained]
    while True:
        further = following[following]
        if np.array_equal(further, following):
            return taken[following]
        following = further

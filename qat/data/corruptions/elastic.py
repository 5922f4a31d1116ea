"""Elastic transform: a random affine map, then a smooth random displacement of every pixel."""

import cv2
import numpy as np
from scipy.fft import dctn, idctn

from qat.data.corruptions.filters import reflected_response


def elastic_transform(
    image: np.ndarray, alpha: float, sigma: float, affine: float, generator: np.random.Generator
) -> np.ndarray:
    """Three points move by up to `affine` pixels, then each pixel by up to `alpha` smoothed ones.

    Args:
        image: (H, W, 3) uint8.
        alpha: Amplitude of the displacement before it is smoothed.
        sigma: Deviation of the Gaussian, cut off at three, that smooths it.
        affine: Amplitude of the affine map.
        generator: Draws both.

    Returns:
        (H, W, 3), values from 0 to 255, not yet cut to integers.
    """
    height, width = image.shape[:2]
    middle, reach = np.array([height // 2, width // 2]), min(height, width) // 3
    corners = np.array([[1, 1], [1, -1], [-1, -1]]) * reach + middle
    corners = corners.astype(np.float32)
    moved = corners + generator.uniform(-affine, affine, corners.shape).astype(np.float32)
    x = cv2.warpAffine(
        image.astype(np.float32),
        cv2.getAffineTransform(corners, moved),
        (width, height),
        borderMode=cv2.BORDER_REFLECT_101,
    )
    right, down = (alpha * _smooth_noise(height, width, sigma, generator) for _ in range(2))
    columns = np.arange(width, dtype=np.float32) + right
    rows = np.arange(height, dtype=np.float32)[:, None] + down
    return cv2.remap(x, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _smooth_noise(
    height: int, width: int, sigma: float, generator: np.random.Generator
) -> np.ndarray:
    """Uniform noise from -1 to 1 under a Gaussian filter that reflects at the borders."""
    noise = generator.uniform(-1, 1, (height, width)).astype(np.float32)
    if sigma == 0:
        return noise
    waves = dctn(noise, norm="ortho")
    waves *= np.outer(*(reflected_response(sigma, 3.0, side) for side in (height, width)))
    return np.asarray(idctn(waves, norm="ortho"))

"""Spatter: drops of water, or splashes of mud, on the lens."""

import cv2
import numpy as np

from qat.data.corruptions.filters import gaussian

WATER = np.array([175, 238, 238], dtype=np.float32)
MUD = np.array([63, 42, 20], dtype=np.float32)


def spatter(
    image: np.ndarray,
    mean: float,
    deviation: float,
    sigma: float,
    threshold: float,
    strength: float,
    mud: bool,
    generator: np.random.Generator,
) -> np.ndarray:
    """Where smoothed noise exceeds a threshold there is liquid; mud covers, water adds light.

    Args:
        image: (H, W, 3) uint8.
        mean: Of the noise.
        deviation: Of the noise.
        sigma: Deviation of the Gaussian that smooths it.
        threshold: From which on there is liquid.
        strength: Of the water's light; of mud, the deviation of the Gaussian that smooths it.
        mud: Mud, not water.
        generator: Draws the noise.

    Returns:
        (H, W, 3), values from 0 to 255, not yet clipped or cut to integers.
    """
    noise = mean + deviation * generator.standard_normal(image.shape[:2], dtype=np.float32)
    liquid = gaussian(noise, sigma)
    liquid[liquid < threshold] = 0
    x = image.astype(np.float32)
    if mud:
        cover = gaussian((liquid > threshold).astype(np.float32), strength)
        cover[cover < 0.8] = 0
        return x + cover[..., None] * (MUD - x)
    light = _relief((liquid * 255).astype(np.uint8))
    return x + (strength * light / max(light.max(), 1e-6))[..., None] * WATER


def _relief(liquid: np.ndarray) -> np.ndarray:
    """Drops with a bright and a dark side, from the distance to their edges."""
    edges = 255 - cv2.Canny(liquid, 50, 150)
    distance = np.minimum(cv2.distanceTransform(edges, cv2.DIST_L2, 5), 20)
    levels = cv2.equalizeHist(cv2.blur(distance, (3, 3)).astype(np.uint8))
    slope = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], dtype=np.float32)
    shaded = cv2.filter2D(levels, cv2.CV_8U, slope)
    return liquid * cv2.blur(shaded, (3, 3)).astype(np.float32)

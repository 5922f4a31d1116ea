"""Noise: Gaussian, shot, impulse and speckle.

Every function takes an image (H, W, 3) uint8, the parameters of its severity and a generator, and
returns values from 0 to 255, not yet clipped or cut to integers. Noise falls on every channel of
every pixel by itself.
"""

import numpy as np


def gaussian_noise(image: np.ndarray, sigma: float, generator: np.random.Generator) -> np.ndarray:
    """Normal noise with deviation `sigma` of the full range, clipped after it is added."""
    return image + _normal(image, 255 * sigma, generator)


def shot_noise(image: np.ndarray, photons: float, generator: np.random.Generator) -> np.ndarray:
    """Poisson counts of at most about `photons` photons, as from a dark sensor."""
    return generator.poisson(image * (photons / 255)) * (255 / photons)


def impulse_noise(image: np.ndarray, amount: float, generator: np.random.Generator) -> np.ndarray:
    """A share `amount` of the values becomes 0 or 255, each as likely."""
    draw = generator.random(image.shape, dtype=np.float32)
    noisy = np.where(draw < amount, np.uint8(255), image)
    return np.where(draw < amount / 2, np.uint8(0), noisy)


def speckle_noise(image: np.ndarray, sigma: float, generator: np.random.Generator) -> np.ndarray:
    """Normal noise in proportion to the value."""
    return image + image * _normal(image, sigma, generator)


def _normal(image: np.ndarray, sigma: float, generator: np.random.Generator) -> np.ndarray:
    return sigma * generator.standard_normal(image.shape, dtype=np.float32)

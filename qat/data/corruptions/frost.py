"""Five frost textures, made here: veins of ice over cloudy noise, without edges.

The original blends photographs, which are other people's work. These share their mean and contrast
in each channel, on which the strength of the corruption depends, and nothing else.
"""

from functools import lru_cache

import cv2
import numpy as np

SIDE = 512

# Red, green and blue, as a randomly placed crop of 224 pixels of each photograph shows them.
MEANS = np.array(
    [[77, 148, 164], [198, 202, 211], [198, 202, 211], [145, 160, 172], [101, 112, 124]]
)
DEVIATIONS = np.array([[28, 16, 15], [20, 21, 22], [20, 21, 22], [27, 27, 28], [38, 38, 37]])


@lru_cache(maxsize=16)
def texture(number: int, scale: float = 1.0) -> np.ndarray:
    """A texture.

    Args:
        number: Which, 0 to 4.
        scale: Of its side of 512 pixels.

    Returns:
        (S, S, 3) float32, values from 0 to 255; it may be tiled.
    """
    generator = np.random.default_rng((20190328, number))
    relief = _veins(generator) + 0.5 * _clouds(1.0, generator)
    relief = (relief - relief.mean()) / relief.std()
    picture = MEANS[number] + DEVIATIONS[number] * relief[..., None]
    picture = np.clip(picture, 0, 255).astype(np.float32)
    return picture if scale == 1 else cv2.resize(picture, None, fx=scale, fy=scale)


def _veins(generator: np.random.Generator) -> np.ndarray:
    """Ridges where smooth noise crosses zero, in four sizes, each bent by the clouds."""
    bend = [24 * _clouds(1.8, generator) for _ in range(2)]
    rows, columns = np.indices((SIDE, SIDE))
    at = tuple(((a + b) % SIDE).astype(int) for a, b in zip((rows, columns), bend, strict=True))
    total = np.zeros((SIDE, SIDE))
    for octave in range(4):
        band = _clouds(0.0, generator, low=6 * 2**octave, high=14 * 2**octave)
        total += 0.8**octave * np.exp(-3 * np.abs(band))
    return total[at] / total.std()


def _clouds(
    roughness: float, generator: np.random.Generator, low: int = 1, high: int = SIDE
) -> np.ndarray:
    """Noise of unit variance with waves from `low` to `high` a side, fading as their number."""
    waves = np.hypot(*np.meshgrid(*[np.fft.fftfreq(SIDE, 1 / SIDE)] * 2))
    gain = np.where((waves >= low) & (waves <= high), np.maximum(waves, 1) ** -roughness, 0)
    noise = np.fft.ifft2(np.fft.fft2(generator.standard_normal((SIDE, SIDE))) * gain).real
    return noise / noise.std()

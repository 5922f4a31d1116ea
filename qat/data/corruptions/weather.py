"""Weather: snow, frost and fog.

Every function takes an image (H, W, 3) uint8, the parameters of its severity and a generator, and
returns values from 0 to 255, not yet clipped or cut to integers.
"""

import cv2
import numpy as np
import torch

from qat.data.corruptions.filters import motion, zoom_in
from qat.data.corruptions.frost import texture


def snow(
    image: np.ndarray,
    mean: float,
    deviation: float,
    zoom: float,
    threshold: float,
    radius: float,
    sigma: float,
    mix: float,
    generator: np.random.Generator,
) -> np.ndarray:
    """Flakes that fall steeply, and the image whitened; a share `mix` of it stays as it is."""
    height, width = image.shape[:2]
    noise = mean + deviation * generator.standard_normal((height, width), dtype=np.float32)
    flakes = zoom_in(torch.from_numpy(noise)[None], zoom)[0].numpy()
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1) * 255)
    falling = generator.uniform(-135, -45)
    flakes = np.floor(motion(np.floor(flakes).astype(np.float32), radius, sigma, falling))
    x = image.astype(np.float32)
    white = np.maximum(x, cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None] * 1.5 + 127.5)
    layers = flakes + np.rot90(flakes, 2)
    return mix * x + (1 - mix) * white + layers[..., None]


def frost(
    image: np.ndarray,
    share: float,
    frost_share: float,
    scale: float,
    generator: np.random.Generator,
) -> np.ndarray:
    """The weighted sum of the image and a part of one of five frost textures of our own."""
    picture = texture(int(generator.integers(5)), scale)
    height, width = image.shape[:2]
    top, left = (int(generator.integers(side)) for side in picture.shape[:2])
    rows = np.arange(top, top + height) % picture.shape[0]
    columns = np.arange(left, left + width) % picture.shape[1]
    return share * image.astype(np.float32) + frost_share * picture[rows[:, None], columns]


def fog(
    image: np.ndarray, amount: float, decay: float, side: int, generator: np.random.Generator
) -> np.ndarray:
    """A fractal cloud is added, and the sum scaled back to the brightest value of the image."""
    height, width = image.shape[:2]
    side = max(side, 1 << (max(height, width) - 1).bit_length())
    cloud = 255 * amount * plasma(side, decay, generator)[:height, :width, None]
    brightest = image.max() / 255
    return (image + cloud) * (brightest / (brightest + amount))


def plasma(side: int, decay: float, generator: np.random.Generator) -> np.ndarray:
    """A fractal from 0 to 1 on a torus, by midpoint displacement.

    Each round fills the centres of the squares, then those of the diamonds, with the mean of their
    four neighbours plus uniform noise within the square of an amplitude that starts at 100 and
    shrinks by `decay`.

    Args:
        side: Pixels, a power of two.
        decay: Above 1; the larger, the smoother.
        generator: Draws the noise.
    """
    field = np.zeros((side, side))
    step, amplitude = side, 100.0
    while step > 1:
        half = step // 2
        corners = field[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        centres = _displaced(pairs + np.roll(pairs, -1, 1), amplitude, generator)
        field[half::step, half::step] = centres
        field[::step, half::step] = _displaced(
            centres + np.roll(centres, 1, 0) + corners + np.roll(corners, -1, 1),
            amplitude,
            generator,
        )
        field[half::step, ::step] = _displaced(
            centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 0),
            amplitude,
            generator,
        )
        step, amplitude = half, amplitude / decay
    field -= field.min()
    return field / field.max()


def _displaced(total: np.ndarray, amplitude: float, generator: np.random.Generator) -> np.ndarray:
    """The mean of four neighbours, given their sum, plus noise."""
    return total / 4 + amplitude * generator.uniform(-amplitude, amplitude, total.shape)

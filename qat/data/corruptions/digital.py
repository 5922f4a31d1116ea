"""Contrast, colour and coding: brightness, saturate, contrast, pixelate, JPEG.

Functions take an image (H, W, 3) uint8, the parameters of its severity and a generator, which
these do not use, and return values from 0 to 255, not yet clipped or cut to integers.
"""

import io

import numpy as np
from PIL import Image


def brightness(image: np.ndarray, add: float, generator: np.random.Generator) -> np.ndarray:
    """The value of each pixel in HSV plus `add`, hue and saturation kept.

    In closed form: with v the largest channel, every channel times `min(v + add, 1) / v`; black
    becomes grey.
    """
    value = image.max(-1, keepdims=True).astype(np.float32)
    raised = np.minimum(value + 255 * add, 255)
    return np.where(value > 0, image * (raised / np.maximum(value, 1)), raised)


def saturate(
    image: np.ndarray, factor: float, add: float, generator: np.random.Generator
) -> np.ndarray:
    """The saturation of each pixel in HSV times `factor` plus `add`, hue and value kept.

    In closed form: with v the largest channel and s the saturation, each channel c becomes
    `v - (v - c) s' / s`; grey pixels, without hue, count as red.
    """
    x = image.astype(np.float32)
    value = x.max(-1, keepdims=True)
    spread = value - x.min(-1, keepdims=True)
    saturation = spread / np.maximum(value, 1)
    wanted = np.clip(saturation * factor + add, 0, 1)
    distance = (value - x) / np.where(spread > 0, spread, 1)
    red = np.array([0, 1, 1], dtype=np.float32)
    return value * (1 - wanted * np.where(spread > 0, distance, red))


def contrast(image: np.ndarray, factor: float, generator: np.random.Generator) -> np.ndarray:
    """The distance of each channel from its mean times `factor`."""
    mean = image.mean((0, 1), keepdims=True)
    return (image - mean) * factor + mean


def pixelate(image: np.ndarray, factor: float, generator: np.random.Generator) -> np.ndarray:
    """Reduced to `factor` of its size and enlarged again, both by area."""
    height, width = image.shape[:2]
    small = (max(int(width * factor), 1), max(int(height * factor), 1))
    box = Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize(small, box).resize((width, height), box))


def jpeg_compression(image: np.ndarray, quality: int, generator: np.random.Generator) -> np.ndarray:
    """Saved as JPEG and read again."""
    return jpeg_round_trip(image, quality)


def jpeg_round_trip(image: np.ndarray, quality: int) -> np.ndarray:
    """What comes back from a JPEG file of a quality from 1 to 95."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))

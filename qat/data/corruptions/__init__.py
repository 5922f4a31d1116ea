"""Common corruptions of images, after ImageNet-C and CIFAR-10-C.

Hendrycks and Dietterich, ICLR 2019. https://arxiv.org/abs/1903.12261

Written anew from the published parameters and behaviour (docs/decisions/0007-corruptions.md says
how close it comes). What is random is drawn from a generator keyed by (seed, image, corruption,
severity), so that pixels depend on nothing else. A severity's parameters come from one of two
styles: `imagenet`, whose results went through JPEG of quality 85, as the distributed images did,
and `cifar`, whose results did not.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qat.data.corruptions.digital import jpeg_round_trip
from qat.data.corruptions.tables import IMAGENET, PARAMETERS
from qat.extras import needs

Style = Literal["imagenet", "cifar"]

CORRUPTIONS = tuple(IMAGENET)[:15]
"""The benchmark, in its official order."""

HELD_OUT = tuple(IMAGENET)[15:]
"""Four more, for choices that must not be made on the benchmark."""


@dataclass(frozen=True)
class Domain:
    """A corruption at a severity.

    Attributes:
        name: Of the corruption, or `clean`.
        severity: 1 to 5; 0 for `clean`.
    """

    name: str
    severity: int


def require(domain: Domain) -> None:
    """Check that a domain exists, and that what computes it is installed.

    Raises:
        ValueError: If there is no such corruption or severity, or OpenCV is missing.
    """
    if domain == Domain("clean", 0):
        return
    if domain.name not in IMAGENET:
        known = ", ".join((*CORRUPTIONS, *HELD_OUT))
        raise ValueError(f"there is no corruption '{domain.name}'; there are {known}, and clean")
    if not 1 <= domain.severity <= 5:
        raise ValueError(f"severity of {domain.name} must be 1 to 5, got {domain.severity}")
    implementations()


def implementations() -> dict[str, Callable[..., np.ndarray]]:
    """The function of each corruption.

    Raises:
        ValueError: If OpenCV, which they need, is missing.
    """
    with needs("corruptions", "corrupt images"):
        from qat.data.corruptions.functions import FUNCTIONS
    return FUNCTIONS


def corrupt(
    image: np.ndarray, domain: Domain, style: Style, key: tuple[int, int], *, save: bool = True
) -> np.ndarray:
    """Corrupt an image.

    Args:
        image: (H, W, 3) uint8.
        domain: Corruption and severity; `clean` returns the image as it is.
        style: Whose parameters.
        key: Seed and identity of the image.
        save: In style `imagenet`, go through JPEG of quality 85 at the end.

    Returns:
        (H, W, 3) uint8; values are cut off to integers, not rounded, as in the original.

    Raises:
        ValueError: As `require`.
    """
    require(domain)
    if domain.severity == 0:
        return image
    words = (*key, zlib.crc32(domain.name.encode()), domain.severity)
    generator = np.random.default_rng(words)
    parameters = PARAMETERS[style][domain.name][domain.severity - 1]
    result = implementations()[domain.name](image, *parameters, generator)
    result = np.clip(result, 0, 255).astype(np.uint8)
    return jpeg_round_trip(result, 85) if save and style == "imagenet" else result

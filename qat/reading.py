"""The one reader of images: all pixels of the picture that was meant, or one reason why not.

Every image of every command comes from here, from a file, a parquet row or memory, as 8-bit grey
or RGB:

- 16-bit grey is divided by 257. Float and 32-bit images are refused: their range is not known.
- Transparent pixels are laid on white.
- Pictures are turned upright as their EXIF orientation says.
- Palettes, CMYK, YCbCr and black-and-white are converted.
- Several frames (GIF, APNG, WebP, TIFF) are refused: which one is meant is not known. The second
  picture in a photo of a camera (MPO) and the layers of a PSD are not frames.
- Cut files, and pictures of more than 179 million pixels, are refused.

What is refused is named with its reason, once, and no other image takes its label:

- in training it is left out, and counted as `n_refused_train`;
- in evaluation and in a stream it counts as a wrong answer, and in `n_refused` and `n_images`;
- in calibration the next image of the random draw is taken.

A training batch, a calibration or an evaluation of which nothing can be read ends the run.
"""

import warnings
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

Transpose = Image.Transpose
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""What turns a picture upright, by its EXIF orientation."""
GREY, COLOUR = ("1", "L"), ("P", "RGB", "RGBX", "CMYK", "YCbCr")
ONE_PICTURE = ("MPO", "PSD")
"""Formats whose further frames are parts of the one picture, or extras of a camera."""
SIXTEEN_BIT = ("PNG", "PPM")
"""Formats whose 32-bit mode holds 16 bits."""
BITS_PER_SAMPLE = 258
"""Tag of TIFF."""
NUM_NAMED = 20
"""Refused images that are named; further ones are counted only."""


class Unreadable(ValueError):
    """An image that cannot be read as it was meant; its message names it and the reason."""


def read_file(path: str | Path) -> Image.Image:
    """The image in a file; raises `Unreadable` if there is none that can be read."""
    return decoded(lambda: Image.open(path), f"'{shown(path)}'")


def read_bytes(content: bytes | None, name: str) -> Image.Image:
    """The image in an encoded file's bytes; raises `Unreadable` if there is none."""
    return decoded(lambda: Image.open(BytesIO(content or b"")), name)


def decoded(opened: Callable[[], Image.Image], name: str) -> Image.Image:
    """An image as 8-bit grey or RGB, upright, fully decoded.

    Args:
        opened: Opens the image.
        name: What to call it in a refusal.

    Raises:
        Unreadable: If it cannot be read as it was meant.
    """
    try:
        with opened() as image:
            _require_one_picture(image)
            image.load()
            return upright(eight_bit(image), _orientation(image))
    except Unreadable:
        raise
    except Exception as error:  # decoders of broken files raise anything
        raise Unreadable(f"{name} cannot be read: {_reason(error)}") from error


def eight_bit(image: Image.Image) -> Image.Image:
    """An image in 8-bit grey or RGB, transparent pixels laid on white.

    Raises:
        ValueError: If it is of a mode whose range is not known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BIT):
        white = 2 ** getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0] - 1
        levels = np.asarray(image).astype(np.float64) * (255 / white)
        return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    if image.mode in GREY:
        return image.convert("L")
    if image.mode in COLOUR:
        return image.convert("RGB")
    raise ValueError(f"mode {image.mode}, whose range of values is not known; save it in 8 bits")


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """A picture turned as its EXIF orientation says; an unknown one leaves it as it is."""
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def shown(path: str | Path) -> str:
    """A path or name as text that any console can print; bytes that are no text are escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


class Refusals:
    """Images that could not be read; each is named once.

    Args:
        fate: What becomes of them, such as `it counts as wrong`.
    """

    def __init__(self, fate: str) -> None:
        self.fate = fate
        self.faults: set[str] = set()

    def add(self, faults: Iterable[str]) -> None:
        """Name those that are new."""
        for fault in faults:
            if fault not in self.faults:
                self.faults.add(fault)
                self._tell(fault)

    def _tell(self, fault: str) -> None:
        if len(self.faults) <= NUM_NAMED:
            warnings.warn(f"{fault}; {self.fate}", stacklevel=3)
        elif len(self.faults) == NUM_NAMED + 1:
            warnings.warn(f"more images cannot be read; for each, {self.fate}", stacklevel=3)


def _require_one_picture(image: Image.Image) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in ONE_PICTURE:
        raise ValueError(f"animated, {frames} frames; which one is meant is not known")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where the metadata are missing or broken."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as any decoder, and the pixels are whole
        return 1


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is empty, cut, or no image of a kind that Pillow reads"
    if type(error) is ValueError:
        return str(error)
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"

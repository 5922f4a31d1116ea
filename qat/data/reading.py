"""Reading an image that may be broken: all its pixels, or one reason why not."""

from collections.abc import Callable

from PIL import Image

EIGHT_BIT = frozenset(("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"))


class Unreadable(ValueError):
    """An image that cannot be read as it was meant; its message is the reason."""


def read_rgb(read: Callable[[int], Image.Image], index: int) -> Image.Image:
    """The image at an index as 8-bit RGB, fully decoded.

    Grey, palette, CMYK and transparent images are converted. Refused are files without, or with a
    broken image, and those whose conversion would guess: several frames, more than 8 bits.

    Raises:
        Unreadable: With the reason.
    """
    try:
        with read(index) as image:
            frames, mode = getattr(image, "n_frames", 1), image.mode
            if frames == 1 and mode in EIGHT_BIT:
                return image.convert("RGB")
    except Exception as error:  # decoders of broken files raise anything
        raise Unreadable(f"image {index}: {type(error).__name__}: {error}") from error
    if frames > 1:
        raise Unreadable(f"image {index}: animated, {frames} frames; which one is meant is unknown")
    raise Unreadable(f"image {index}: mode {mode}, expected 8 bits a channel")

"""Labelled images in the IDX format of MNIST and its kin, gzipped or not."""

import gzip
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from qat.data.sources import Source

TYPE_UBYTE = 8


def idx(
    images: str,
    labels: str,
    split: Literal["train", "test", "all"] = "all",
    num_test: int = 2000,
    num_classes: int = 10,
) -> Source:
    """Grey images and their classes from a pair of files.

    A single pair can serve training and evaluation: a fixed shuffle puts `num_test` images into
    `test` and the others into `train`.

    Args:
        images: File of unsigned bytes (count, rows, columns).
        labels: File of unsigned bytes (count).
        split: Which part.
        num_test: Images of the part `test`.
        num_classes: Number of classes of the task.

    Raises:
        ValueError: If a file is missing or of another format, their counts differ, or the part
            would be empty.
    """
    pixels, classes = _read(images, 3), _read(labels, 1)
    if len(pixels) != len(classes):
        raise ValueError(f"'{images}' holds {len(pixels)} images, '{labels}' {len(classes)} labels")
    if split != "all":
        if not 0 < num_test < len(pixels):
            raise ValueError(
                f"num_test {num_test} must leave some of the {len(pixels)} images for either part"
            )
        order = np.random.default_rng(0).permutation(len(pixels))
        chosen = order[:num_test] if split == "test" else order[num_test:]
        pixels, classes = pixels[chosen], classes[chosen]
    return Source(lambda i: Image.fromarray(pixels[i]), classes.astype(np.int64), num_classes)


def _read(path: str, num_axes: int) -> np.ndarray:
    if not Path(path).is_file():
        raise ValueError(f"no file '{path}'; if it is an asset, is LOWBIT_ASSETS set?")
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        shape = np.frombuffer(data, ">i4", num_axes, offset=4)
        if data[2:4] != bytes([TYPE_UBYTE, num_axes]):
            raise ValueError(f"its head says {data[:4].hex()}")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * num_axes).reshape(shape)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"'{path}' is no IDX file of bytes with {num_axes} axes ({error})"
        ) from None

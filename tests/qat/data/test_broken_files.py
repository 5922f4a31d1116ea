"""Every file of a stream is accounted for: read, or refused with its reason; never substituted."""

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qat.data.corrupted import Generated
from qat.data.protocols import Continual
from qat.data.sources import Source
from qat.data.streams import Stream
from qat.preprocessing import Preprocessing
from qat.reading import Unreadable, read_file

SMALL = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)


def encoded(form: str, image: Image.Image | None = None, **options: object) -> bytes:
    """A file's bytes."""
    file = io.BytesIO()
    (image or Image.fromarray(PIXELS[0])).save(file, form, **options)
    return file.getvalue()


def bomb() -> bytes:
    """The header of a PNG of 20,000 x 20,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + encoded("PNG")[33:]


def animated() -> bytes:
    """A GIF of two frames."""
    frames = [Image.fromarray(PIXELS[i]) for i in (0, 1)]
    return encoded("GIF", frames[0], save_all=True, append_images=frames[1:])


JPEG = encoded("JPEG")
BROKEN: dict[str, bytes] = {
    "empty": b"",
    "text": b"this is no image\n" * 20,
    "html": b"<html><body>404</body></html>",
    "zeros": bytes(2000),
    "bomb": bomb(),
    "animated": animated(),
    "float": encoded("TIFF", Image.fromarray(PIXELS[0, ..., 0].astype(np.float32))),
    "broken PNG": encoded("PNG")[:60] + bytes(40) + encoded("PNG")[100:],
    "broken header": b"\xff\xd8" + bytes(30) + JPEG[32:],
    **{f"JPEG cut at {k} of 10": JPEG[: len(JPEG) * k // 10] for k in range(1, 10)},
}


def place(kind: str, path: Path) -> None:
    """Put what is broken in the place of a good file."""
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind != "missing":
        path.write_bytes(BROKEN[kind])


KINDS = (*BROKEN, "missing", "directory", "loop")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty good PNG files."""
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def stream(folder: Path) -> Stream:
    """The files under two corruptions, eight a batch."""
    source = Source(lambda i: Image.open(folder / f"{i}.png"), [i % 4 for i in range(40)], 4)
    return Stream(Generated(source, "cifar"), Continual(("fog", "contrast")), SMALL, 8)


@pytest.mark.parametrize("rate", [0.025, 0.1, 0.5])
def test_given_is_read_plus_refused_and_no_row_moves(folder: Path, rate: float) -> None:
    good = {
        (index, name): pixels
        for batch in stream(folder).batches()
        for index, name, pixels in zip(
            batch.indices.tolist(), batch.domains, batch.images, strict=True
        )
    }
    generator = np.random.default_rng(1)
    bad = generator.permutation(40)[: int(40 * rate)].tolist()
    for number, index in enumerate(bad):
        place(KINDS[number % len(KINDS)], folder / f"{index}.png")
    rows = 0
    for batch in stream(folder).batches():
        rows += len(batch.labels)
        for row, index in enumerate(batch.indices.tolist()):
            assert batch.labels[row] == index % 4
            assert (batch.faults[row] is not None) == (index in bad)
            if index in bad:
                assert batch.images[row].isnan().all()
                assert str(index) in str(batch.faults[row])
            else:
                assert torch.equal(batch.images[row], good[index, batch.domains[row]])
    assert rows == 2 * 40


@pytest.mark.parametrize("kind", KINDS)
def test_broken_file_is_refused_with_a_reason(folder: Path, kind: str) -> None:
    place(kind, folder / "7.png")
    with pytest.raises(Unreadable, match=r"7\.png' cannot be read: .{10}"):
        read_file(folder / "7.png")


CONVERTED: dict[str, Callable[[Image.Image], bytes]] = {
    "grey": lambda image: encoded("PNG", image.convert("L")),
    "palette": lambda image: encoded("PNG", image.convert("P")),
    "transparent": lambda image: encoded("PNG", image.convert("RGBA")),
    "black and white": lambda image: encoded("PNG", image.convert("1")),
    "CMYK": lambda image: encoded("JPEG", image.convert("CMYK")),
    "misnamed": lambda image: encoded("JPEG", image),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_other_colour_modes_are_converted(folder: Path, kind: str) -> None:
    (folder / "7.png").write_bytes(CONVERTED[kind](Image.fromarray(PIXELS[7])))
    image = read_file(folder / "7.png")
    assert image.mode == ("L" if kind in ("grey", "black and white") else "RGB")
    assert image.size == (32, 32)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_file_without_permission_is_refused(folder: Path) -> None:
    (folder / "7.png").chmod(0)
    with pytest.raises(Unreadable, match="PermissionError"):
        read_file(folder / "7.png")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_no_file_stays_open(folder: Path) -> None:
    for number, kind in enumerate(KINDS):
        place(kind, folder / f"{number}.png")
    before = len(os.listdir("/proc/self/fd"))
    for batch in stream(folder).batches():
        assert len(batch.faults) == 8
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_stream_goes_on_when_every_file_is_gone(folder: Path) -> None:
    whole = stream(folder)
    shutil.rmtree(folder)
    batches = list(whole.batches())
    assert len(batches) == len(whole) == 10
    assert all(batch.images.isnan().all() for batch in batches)
    assert all(fault is not None for batch in batches for fault in batch.faults)

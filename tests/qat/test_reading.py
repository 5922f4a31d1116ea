"""The one reader: every kind of picture comes out right, or is refused with its reason."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qat.reading import NUM_NAMED, Refusals, Unreadable, decoded, read_bytes, read_file, shown

LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY = Image.fromarray(LEVELS)
COLOUR = Image.fromarray(np.stack([LEVELS, LEVELS.T, 255 - LEVELS], 2))


def encoded(form: str, image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def frames(form: str) -> bytes:
    return encoded(form, COLOUR, save_all=True, append_images=[COLOUR.rotate(90)])


def marked(form: str, orientation: int, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(form, COLOUR, exif=exif.tobytes(), **options)


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(read_bytes(content, "it"))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_its_levels(form: str) -> None:
    """Black is 0, white 255, and every level between is its 257th part, rounded."""
    deep = Image.fromarray(LEVELS.astype(np.uint16) * 257 + np.uint16(100) * (LEVELS < 255))
    assert np.array_equal(pixels(encoded(form, deep)), LEVELS)


def test_sixteen_bit_colour_keeps_its_levels() -> None:
    import cv2

    deep = np.stack([LEVELS, LEVELS.T, 255 - LEVELS], 2).astype(np.uint16) * 257
    _, content = cv2.imencode(".png", deep[..., ::-1])
    assert np.array_equal(pixels(content.tobytes()), np.asarray(COLOUR))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded("TIFF", Image.fromarray(LEVELS.astype(np.float32))), "mode F, whose range"),
        (encoded("TIFF", Image.fromarray(LEVELS.astype(np.int32))), "mode I, whose range"),
        (frames("GIF"), "animated, 2 frames"),
        (frames("PNG"), "animated, 2 frames"),
        (frames("TIFF"), "animated, 2 frames"),
        (frames("WEBP"), "animated, 2 frames"),
        (encoded("JPEG", COLOUR)[:-40], "[Tt]runcated"),
        (encoded("PNG", COLOUR)[:60], "[Tt]runcated|broken"),
        (b"", "it is empty, cut, or no image"),
        (b"<html>404</html>", "it is empty, cut, or no image"),
        (None, "it is empty, cut, or no image"),
    ],
)
def test_what_cannot_be_read_as_meant_is_refused_with_its_name(
    content: bytes | None, reason: str
) -> None:
    with pytest.raises(Unreadable, match=f"^row 7 cannot be read: .*({reason})"):
        read_bytes(content, "row 7")


WHITE, RED = (255, 255, 255), (255, 0, 0)


def see_through(mode: str) -> bytes:
    """Left half transparent black, right half opaque red."""
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((*RED, 255), (8, 0, 16, 16))
    if mode == "palette":
        return encoded("GIF", image)
    return encoded("PNG", image.convert(mode))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette"])
def test_transparent_pixels_are_laid_on_white(mode: str) -> None:
    found = read_bytes(see_through(mode), "it").convert("RGB")
    assert found.getpixel((2, 2)) == WHITE
    assert found.getpixel((12, 2)) == (RED if mode != "LA" else (76, 76, 76))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB"])
def test_other_modes_are_converted_to_grey_or_rgb(mode: str) -> None:
    image = (GREY if mode == "1" else COLOUR).convert(mode)
    found = read_bytes(encoded("TIFF", image), "it")
    assert found.mode == ("L" if mode in ("1", "L") else "RGB")
    assert np.array_equal(np.asarray(found), np.asarray(image.convert(found.mode)))


TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
    9: lambda x: x,  # there is no such orientation
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_pictures_are_turned_upright_as_exif_says(form: str, orientation: int) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    expected = TURNED[orientation](np.asarray(COLOUR))
    assert np.array_equal(pixels(marked(form, orientation, **options)), expected)


def test_broken_metadata_leave_the_picture_as_it_is() -> None:
    content = encoded("JPEG", COLOUR, exif=b"Exif\0\0 this is none")
    assert np.array_equal(pixels(content), np.asarray(Image.open(io.BytesIO(content))))


def test_photo_with_a_second_picture_is_the_photo(tmp_path: Path) -> None:
    """Phones put a preview or a depth map behind the photo."""
    path = tmp_path / "phone.jpg"
    COLOUR.save(path, "MPO", save_all=True, append_images=[GREY.convert("RGB")])
    with Image.open(path) as image:
        assert image.n_frames == 2
        assert np.array_equal(np.asarray(read_file(path)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("limit", "read"), [(128, True), (127, False)])
def test_pictures_of_up_to_twice_pillows_limit_are_read(
    monkeypatch: pytest.MonkeyPatch, limit: int, read: bool
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # the picture has 256
    if read:
        assert pixels(encoded("PNG", GREY)).shape == (16, 16)
    else:
        with pytest.raises(Unreadable, match="DecompressionBomb"):
            pixels(encoded("PNG", GREY))


def test_content_decides_and_not_the_extension(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded("JPEG", COLOUR))
    assert read_file(tmp_path / "x.png").size == (16, 16)


def test_image_in_memory_is_the_same_one_and_a_refusal_keeps_its_words() -> None:
    assert np.array_equal(np.asarray(decoded(lambda: GREY, "it")), LEVELS)
    with pytest.raises(Unreadable, match=r"^inner cannot be read"):
        decoded(lambda: read_bytes(b"", "inner"), "outer")


def test_name_that_is_no_text_can_be_printed() -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    shown(name).encode("utf-8")
    with pytest.raises(Unreadable, match=r"caf.*\.jpg"):
        read_file(name)


def test_each_refusal_is_told_once_and_a_flood_is_cut() -> None:
    refusals = Refusals("it counts as wrong")
    with pytest.warns(UserWarning) as told:
        for _ in range(2):
            refusals.add(f"'{i}.jpg' cannot be read: cut" for i in range(NUM_NAMED + 30))
    assert len(refusals.faults) == NUM_NAMED + 30
    assert len(told) == NUM_NAMED + 1
    assert str(told[0].message) == "'0.jpg' cannot be read: cut; it counts as wrong"
    assert "more images cannot be read" in str(told[-1].message)

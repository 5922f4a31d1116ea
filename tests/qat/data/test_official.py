"""The official files give the images they hold, of the right class, severity and number."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qat.data.corrupted import CorruptedImages
from qat.data.corruptions import Domain
from qat.data.official import CifarC, ImageNetC
from qat.data.protocols import CleanAfterShift, Continual
from qat.data.sources import Source
from qat.data.streams import Stream
from qat.preprocessing import Preprocessing
from qat.reading import Unreadable

SYNSETS = ("n01440764", "n02123045", "n15075141")  # classes 0, 281 and 999 of ImageNet-1k
EXPECTS = Preprocessing((3, 224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")
SMALL = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")


def grey(level: int, size: int = 224) -> Image.Image:
    """A picture of one level, which survives any JPEG."""
    return Image.new("RGB", (size, size), (level, level, level))


@pytest.fixture
def imagenet_c(tmp_path: Path) -> Path:
    """Two corruptions, one of them in a folder of its family; level 8 f + s + 100 c by file."""
    for place, corruption in ((tmp_path, 0), (tmp_path / "noise", 1)):
        for severity in (3, 5):
            for file, synset in enumerate(SYNSETS):
                name = ("contrast", "gaussian_noise")[corruption]
                folder = place / name / str(severity) / synset
                folder.mkdir(parents=True)
                grey(8 * file + severity + 100 * corruption).save(folder / "ILSVRC_1.JPEG")
    for file, synset in enumerate(SYNSETS):
        (tmp_path / "val" / synset).mkdir(parents=True)
        grey(200 + file, 300).save(tmp_path / "val" / synset / "ILSVRC_1.JPEG")
    return tmp_path


def level(images: CorruptedImages, index: int, name: str, severity: int) -> int:
    """The level of a picture of one level."""
    return int(np.asarray(images.image(index, Domain(name, severity)))[0, 0, 0])


def test_imagenet_c_finds_each_image_of_its_class_corruption_and_severity(
    imagenet_c: Path,
) -> None:
    images = ImageNetC(str(imagenet_c), clean=str(imagenet_c / "val"))
    assert isinstance(images, CorruptedImages)
    assert list(images.labels) == [0, 281, 999]
    for index in range(3):
        for severity in (3, 5):
            assert level(images, index, "contrast", severity) == 8 * index + severity
            assert level(images, index, "gaussian_noise", severity) == 8 * index + severity + 100
        clean = images.image(index, Domain("clean", 0))
        assert clean.size == (224, 224)
        assert level(images, index, "clean", 0) == 200 + index


def test_imagenet_c_takes_the_images_of_a_list_in_its_order(
    imagenet_c: Path, tmp_path: Path
) -> None:
    lines = tmp_path / "list.txt"
    lines.write_text(f"{SYNSETS[2]}/ILSVRC_1.JPEG\n{SYNSETS[0]}/ILSVRC_1.JPEG\n\n")
    images = ImageNetC(str(imagenet_c), image_list=str(lines))
    assert list(images.labels) == [999, 0]
    assert level(images, 0, "contrast", 5) == 21
    lines.write_text("n00000000/x.JPEG\n")
    with pytest.raises(ValueError, match=r"names class 'n00000000', for which .* has no folder"):
        ImageNetC(str(imagenet_c), image_list=str(lines))


def test_imagenet_c_streams_and_refuses_what_is_missing(imagenet_c: Path) -> None:
    (imagenet_c / "contrast" / "5" / SYNSETS[1] / "ILSVRC_1.JPEG").unlink()
    images = ImageNetC(str(imagenet_c), clean=str(imagenet_c / "val"))
    protocol = CleanAfterShift(("contrast", "gaussian_noise"))
    batches = list(Stream(images, protocol, EXPECTS, 2).batches())
    assert sum(len(batch.labels) for batch in batches) == 4 * 3
    faults = [fault for batch in batches for fault in batch.faults if fault]
    assert len(faults) == 1
    assert "FileNotFoundError" in faults[0]
    with pytest.raises(ValueError, match="no images of fog at severity 5; there are clean, contr"):
        Stream(images, Continual(("fog",)), EXPECTS)
    with pytest.raises(ValueError, match="no images of contrast at severity 4"):
        Stream(images, Continual(("contrast",), severity=4), EXPECTS)


def test_imagenet_c_refuses_folders_it_cannot_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder .*<corruption>/<severity>'; check the path"):
        ImageNetC(str(tmp_path))
    for name in ("cat", "dog"):
        folder = tmp_path / "fog" / "1" / name
        folder.mkdir(parents=True)
        grey(9).save(folder / "a.png")
    with pytest.raises(ValueError, match="2 class folders for 1000 classes, and 'cat' is no Imag"):
        ImageNetC(str(tmp_path))
    assert list(ImageNetC(str(tmp_path), num_classes=2).labels) == [0, 1]


@pytest.fixture
def cifar_c(tmp_path: Path) -> Path:
    """Four images; level 10 s + i."""
    levels = (10 * np.repeat(np.arange(1, 6), 4) + np.tile(np.arange(4), 5)).astype(np.uint8)
    for name, add in (("fog", 0), ("snow", 100)):
        pixels = np.broadcast_to((levels + add)[:, None, None, None], (20, 32, 32, 3))
        np.save(tmp_path / f"{name}.npy", pixels)
    np.save(tmp_path / "labels.npy", np.tile(np.array([3, 1, 4, 1], dtype=np.uint8), 5))
    return tmp_path


def test_cifar_c_finds_each_image_of_its_corruption_and_severity(cifar_c: Path) -> None:
    clean = Source(lambda i: grey(200 + i, 32), [3, 1, 4, 1], 10)
    images = CifarC(str(cifar_c), clean)
    assert isinstance(images, CorruptedImages)
    assert list(images.labels) == [3, 1, 4, 1]
    for index in range(4):
        for severity in range(1, 6):
            assert level(images, index, "fog", severity) == 10 * severity + index
            assert level(images, index, "snow", severity) == 10 * severity + index + 100
        assert level(images, index, "clean", 0) == 200 + index
    stream = Stream(images, CleanAfterShift(("fog", "snow")), SMALL, 3)
    alone = [batch.images for batch in stream.batches()]
    shared = [batch.images for batch in stream.batches(num_workers=2)]
    assert all((a == b).all() for a, b in zip(alone, shared, strict=True))


def test_cifar_c_refuses_what_is_not_there_or_not_of_the_layout(cifar_c: Path) -> None:
    images = CifarC(str(cifar_c))
    with pytest.raises(ValueError, match="no array of frost; there are fog, snow"):
        images.require(Domain("frost", 1))
    with pytest.raises(ValueError, match="clean needs the argument `clean`"):
        images.require(Domain("clean", 0))
    with pytest.raises(ValueError, match="clean images have other labels"):
        CifarC(str(cifar_c), Source(lambda i: grey(0), [0, 1, 2, 3], 10))
    np.save(cifar_c / "frost.npy", np.zeros((19, 32, 32, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"uint8 \(19, 32, 32, 3\), expected uint8 \(20, height"):
        CifarC(str(cifar_c)).require(Domain("frost", 1))
    with pytest.raises(ValueError, match="label 4 exceeds the 3 classes"):
        CifarC(str(cifar_c), num_classes=3)
    np.save(cifar_c / "labels.npy", np.arange(20))
    with pytest.raises(ValueError, match="same labels five times"):
        CifarC(str(cifar_c))
    (cifar_c / "labels.npy").unlink()
    with pytest.raises(ValueError, match=r"no file .*labels.npy'; check the path"):
        CifarC(str(cifar_c))


def test_cifar_c_file_that_vanishes_is_a_refused_row(cifar_c: Path) -> None:
    images = CifarC(str(cifar_c))
    (cifar_c / "fog.npy").unlink()
    with pytest.raises(Unreadable, match=r"image 2 cannot be read: .*No such file"):
        images.image(2, Domain("fog", 1))

"""The distributed benchmarks, from their official files, behind the interface of generated ones."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

from qat.data.corrupted import imagenet_crop
from qat.data.corruptions import Domain
from qat.data.reading import Unreadable, read_rgb
from qat.data.sources import Source


class ImageNetC:
    """ImageNet-C: images in `root/<corruption>/<severity>/<class>/<file>`.

    The folders of the corruptions may lie in others (`noise/gaussian_noise`), as the archives are
    named. The images are those of the first corruption and severity found, or of a list.

    Args:
        root: The folder.
        clean: Folder of the uncorrupted images, `<class>/<file>`, for domain `clean`; these are
            resized and cropped as the corrupted ones were.
        image_list: Text file with a `<class>/<file>` a line, such as the list of 5,000 images on
            which many results are reported; None takes all.
        num_classes: Number of classes of the task. If there are as many folders, a class's index is
            its folder's place in alphabetical order; if fewer, that of its synset in ImageNet-1k.

    Raises:
        ValueError: If there is no image, or a folder's class is not known.
    """

    cropped = True

    def __init__(
        self,
        root: str,
        clean: str | None = None,
        image_list: str | None = None,
        num_classes: int = 1000,
    ) -> None:
        found = [*Path(root).glob("*/[1-5]"), *Path(root).glob("*/*/[1-5]")]
        self.folders = {Domain(path.parent.name, int(path.name)): path for path in found}
        if not self.folders:
            raise ValueError(f"no folder '{root}/<corruption>/<severity>'; check the path")
        first = next(iter(self.folders.values()))
        if clean is not None:
            self.folders[Domain("clean", 0)] = Path(clean)
        if image_list is None:
            files = (path for path in first.glob("*/*") if path.is_file())
            self.files = sorted(path.relative_to(first).as_posix() for path in files)
        else:
            self.files = _lines(image_list)
        if not self.files:
            raise ValueError(f"no image in '{first}/<class>'; check the path")
        classes = _classes(sorted(path.name for path in first.iterdir()), num_classes)
        try:
            self.labels = [classes[name.split("/")[0]] for name in self.files]
        except KeyError as error:
            raise ValueError(
                f"'{image_list}' names class {error}, for which '{first}' has no folder"
            ) from None
        self.num_classes = num_classes

    def require(self, domain: Domain) -> None:
        """Raise ValueError if a domain's folder is not there."""
        if domain not in self.folders:
            there = ", ".join(sorted({domain.name for domain in self.folders}))
            raise ValueError(
                f"no images of {domain.name} at severity {domain.severity}; there are {there}"
            )

    def image(self, index: int, domain: Domain) -> Image.Image:
        """An image in a domain; raises `Unreadable` if its file is missing or broken."""
        folder = self.folders[domain]
        image = read_rgb(lambda i: Image.open(folder / self.files[i]), index)
        return imagenet_crop(image) if domain.severity == 0 else image


class CifarC:
    """CIFAR-10-C or CIFAR-100-C: `root/<corruption>.npy` and `root/labels.npy`.

    Each array holds the N test images five times, (5 N, 32, 32, 3) uint8, by severity.

    Args:
        root: The folder.
        clean: The uncorrupted images in the same order, for domain `clean`.
        num_classes: Number of classes of the task.

    Raises:
        ValueError: If a file is missing or not of this layout, or `clean` has other labels.
    """

    cropped = False

    def __init__(self, root: str, clean: Source | None = None, num_classes: int = 10) -> None:
        self.arrays = {path.stem: path for path in Path(root).glob("*.npy")}
        if "labels" not in self.arrays:
            raise ValueError(f"no file '{root}/labels.npy'; check the path")
        labels = np.load(self.arrays.pop("labels"))
        self.size = len(labels) // 5
        self.labels = labels[: self.size].astype(np.int64)
        if len(labels) != 5 * self.size or (labels != np.tile(labels[: self.size], 5)).any():
            raise ValueError(f"'{root}/labels.npy' does not hold the same labels five times")
        if clean is not None and not np.array_equal(clean.labels, self.labels):
            raise ValueError(f"the clean images have other labels than '{root}/labels.npy'")
        if self.labels.max() >= num_classes:
            raise ValueError(f"label {self.labels.max()} exceeds the {num_classes} classes")
        self.clean = clean
        self.num_classes = num_classes
        self.opened: dict[str, np.ndarray] = {}

    def require(self, domain: Domain) -> None:
        """Raise ValueError if a domain's array is not there, or not of the layout."""
        if domain.severity == 0:
            if self.clean is None:
                raise ValueError("domain clean needs the argument `clean`, the uncorrupted images")
            return
        if domain.name not in self.arrays:
            there = ", ".join(sorted(self.arrays))
            raise ValueError(f"no array of {domain.name}; there are {there}")
        array = self._array(domain.name)
        if len(array) != 5 * self.size or array.shape[3:] != (3,) or array.dtype != np.uint8:
            raise ValueError(
                f"'{self.arrays[domain.name]}' is {array.dtype} {array.shape}, expected uint8 "
                f"({5 * self.size}, height, width, 3)"
            )

    def image(self, index: int, domain: Domain) -> Image.Image:
        """An image in a domain; raises `Unreadable` if it cannot be read."""
        if domain.severity == 0 and self.clean is not None:
            return read_rgb(self.clean.read, index)
        try:
            row = self._array(domain.name)[(domain.severity - 1) * self.size + index]
        except OSError as error:
            raise Unreadable(f"image {index}: {error}") from error
        return Image.fromarray(row)

    def _array(self, name: str) -> np.ndarray:
        if name not in self.opened:
            self.opened[name] = np.load(self.arrays[name], mmap_mode="r")
        return self.opened[name]


def _lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text().split("\n")
    except OSError as error:
        raise ValueError(f"image list '{path}' cannot be read: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def _classes(folders: Sequence[str], num_classes: int) -> dict[str, int]:
    """Class index of each folder."""
    if len(folders) == num_classes:
        return {name: index for index, name in enumerate(folders)}
    synsets = {name: index for index, name in enumerate(ImageNetInfo().label_names())}
    if unknown := [name for name in folders if name not in synsets]:
        raise ValueError(
            f"{len(folders)} class folders for {num_classes} classes, and '{unknown[0]}' is no "
            "ImageNet synset; set num_classes to the number of folders"
        )
    return {name: synsets[name] for name in folders}

"""The distributed benchmarks, from their official files, behind the interface of generated ones."""

from pathlib import Path

import numpy as np
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

from qat.data.classes import ClassNames
from qat.data.corrupted import imagenet_crop
from qat.data.corruptions import Domain
from qat.data.listing import class_folders, class_name, is_hidden
from qat.data.sources import Source
from qat.reading import Unreadable, read_file


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
            its folder's place in the order of code points; if fewer, that of its synset in
            ImageNet-1k.

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
        found = sorted([*Path(root).glob("*/[1-5]"), *Path(root).glob("*/*/[1-5]")])
        seen = [path for path in found if not any(map(is_hidden, path.relative_to(root).parts))]
        self.folders = {Domain(path.parent.name, int(path.name)): path for path in seen}
        if not self.folders:
            raise ValueError(f"no folder '{root}/<corruption>/<severity>'; check the path")
        first = next(iter(self.folders.values()))
        if clean is not None:
            self.folders[Domain("clean", 0)] = Path(clean)
        folders = class_folders(first)
        self.class_names = _names(tuple(folders), num_classes)
        if image_list is None:
            paths = [path for found in folders.values() for path in found]
            self.files = [path.relative_to(first).as_posix() for path in paths]
        else:
            self.files = _lines(image_list)
        names = [class_name(file.split("/")[0]) for file in self.files]
        if unknown := [name for name in names if name not in folders]:
            raise ValueError(
                f"'{image_list}' names class '{unknown[0]}', for which '{first}' has no folder"
            )
        places = {name: index for index, name in enumerate(self.class_names)}
        self.labels = [places[name] for name in names]
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
        image = read_file(folder / self.files[index]).convert("RGB")
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
    class_names = None
    files = None

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
            return self.clean.image(index).convert("RGB")
        try:
            row = self._array(domain.name)[(domain.severity - 1) * self.size + index]
        except OSError as error:
            raise Unreadable(f"image {index} cannot be read: {error}") from error
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


def _names(folders: ClassNames, num_classes: int) -> ClassNames:
    """Name of each class: the folders', or the synsets of ImageNet where there are fewer."""
    if len(folders) == num_classes:
        return folders
    synsets = tuple(ImageNetInfo().label_names())
    if unknown := [name for name in folders if name not in synsets]:
        raise ValueError(
            f"{len(folders)} class folders for {num_classes} classes, and '{unknown[0]}' is no "
            "ImageNet synset; set num_classes to the number of folders"
        )
    return synsets

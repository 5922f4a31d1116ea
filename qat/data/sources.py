"""Labelled images from what is at hand: folders, tables, parquet files, scikit-learn's digits.

A source is a map-style dataset of (PIL image, class index) with a `num_classes` and, where known,
class names. Torchvision and hub sets come from `timm_source`, which downloads where asked to.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data.dataset_factory import create_dataset

from qat.data import tables
from qat.data.classes import ClassNames, Labels, relabelled
from qat.data.listing import class_folders, class_name, images_below, split_folder
from qat.extras import imported
from qat.reading import decoded, read_bytes, read_file

UNKNOWN = -1
"""The label of an image that has none."""


class Source:
    """A dataset of (PIL image, class index); an image is 8-bit grey or RGB, see `qat.reading`.

    Args:
        read: Returns the image at an index.
        labels: Class index of every image; `UNKNOWN` for all where there are no classes.
        num_classes: Number of classes of the task, which may exceed those present.
        ids: What identifies each image, whichever part of the data this is; None numbers them.
        class_names: Name of each class; None where they have none.
        files: Name of each image for people; None where they have none.

    Raises:
        ValueError: If there is no image, or a label lies outside the classes.
    """

    def __init__(
        self,
        read: Callable[[int], Image.Image],
        labels: Labels,
        num_classes: int,
        ids: Sequence[int] | None = None,
        class_names: ClassNames | None = None,
        files: Sequence[str] | None = None,
    ) -> None:
        if not len(labels):
            raise ValueError("the data set is empty; check the path and the split")
        self.labelled = num_classes > 0
        if self.labelled and (min(labels) < 0 or max(labels) >= num_classes):
            raise ValueError(
                f"labels run from {min(labels)} to {max(labels)}, outside the {num_classes} "
                "classes; correct num_classes"
            )
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"{len(class_names)} class names for {num_classes} classes")
        self.read = read
        self.labels = labels
        self.num_classes = num_classes
        self.ids = range(len(labels)) if ids is None else ids
        self.class_names = class_names
        self.files = files

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """The image at an index; raises `Unreadable` if it cannot be read."""
        return decoded(lambda: self.read(index), f"image {index}")

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.image(index), int(self.labels[index])


def subset(source: Source, indices: Labels) -> Source:
    """Some images of a source, with the ids they have there.

    Args:
        source: The source.
        indices: Which images, in which order.
    """
    labels = [int(source.labels[int(index)]) for index in indices]
    ids = [int(source.ids[int(index)]) for index in indices]
    return Source(
        lambda i: source.image(int(indices[i])),
        labels,
        source.num_classes,
        ids,
        source.class_names,
        None if source.files is None else [source.files[int(index)] for index in indices],
    )


def aligned(source: Source, class_names: ClassNames | None, what: str, complete: bool) -> Source:
    """A source with its labels as indices into other class names, see `relabelled`.

    Raises:
        ValueError: Naming the classes that only one side has.
    """
    if source.class_names is None or class_names is None:
        return source
    labels = relabelled(source.labels, source.class_names, class_names, what, complete)
    return Source(source.read, labels, len(class_names), source.ids, class_names, source.files)


def digits(split: str) -> Source:
    """scikit-learn's digits: 1797 real grey images of 8x8 pixels, ten classes, no download.

    The split is stratified and shuffled once, with a fixed seed, so writers appear in both halves.
    (The last 360 images in file order are other writers, and a much harder test.)

    Args:
        split: `train`, 1437 images, or `test`, 360 images.

    Raises:
        ValueError: If there is no such split.
    """
    bunch: Any = load_digits()
    train, test = train_test_split(
        np.arange(len(bunch.target)), test_size=360, stratify=bunch.target, random_state=0
    )
    if split not in ("train", "test"):
        raise ValueError(f"digits has splits 'train' and 'test', not '{split}'")
    indices = train if split == "train" else test
    pixels = (bunch.images[indices] * (255 / 16)).round().astype(np.uint8)
    names = tuple("0123456789")
    return Source(lambda i: Image.fromarray(pixels[i]), bunch.target[indices], 10, None, names)


def parquet(path: str, image: str = "image", label: str = "label") -> Source:
    """A parquet file with a column of encoded images and one of classes.

    Args:
        path: The file, or a glob of files.
        image: Name of the image column.
        label: Name of the label column: class indices, or class names.

    Raises:
        ValueError: If there is no such file or column, a row has no label, or `datasets` is
            missing.
    """
    datasets = imported("datasets", "datasets", "read parquet files")
    try:
        table = datasets.load_dataset("parquet", data_files=path, split="train")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"no parquet file '{path}' that can be read; if it is an asset, is LOWBIT_ASSETS set? "
            f"({error})"
        ) from None
    for column in (image, label):
        if column not in table.column_names:
            raise ValueError(f"'{path}' has no column '{column}', only {table.column_names}")
    table = table.cast_column(image, datasets.Image(decode=False))
    return _of_columns(table, image, label, f"'{path}'")


def _of_columns(table: Any, image: str, label: str, what: str) -> Source:
    """The images and classes in two columns of a table of `datasets`."""

    def where(row: int) -> str:
        return f"{what}, row {row}"

    def read(row: int) -> Image.Image:
        cell = table[row][image] or {}
        if cell.get("bytes") is None and cell.get("path"):
            return read_file(cell["path"])
        return read_bytes(cell.get("bytes"), where(row))

    values = list(table[label])
    names = getattr(table.features[label], "names", None)
    if any(isinstance(value, str) for value in values):
        labels, names = tables.named(values, where)
    else:
        labels = tables.indices(values, where, None if names is None else len(names))
    number = max(labels, default=0) + 1 if names is None else len(names)
    return Source(read, labels, number, class_names=None if names is None else tuple(names))


def labelled_folder(root: str, labels: str, num_classes: int | None = None) -> Source:
    """Images anywhere below a folder, with a table of their classes.

    Args:
        root: The folder.
        labels: The table, separated by tabs or commas. Its column `file` holds paths relative to
            the root, or base names where these occur once; `class_index` or `class_name` the class.
        num_classes: Number of classes of the task; None is as many as the table has.

    Raises:
        ValueError: If the table or an image that it names is missing, or a row has no clear image
            or class.
    """
    rows = tables.read_table(labels)
    paths = tables.files_of(rows, labels, root)
    found, names = tables.classes_of(rows, labels, num_classes)
    number = num_classes or max(found, default=0) + 1
    return _of_files(paths, root, found, number, names)


def image_folder(
    root: str, split: Literal["train", "val", "all"] = "all", val_share: float = 0.2
) -> Source:
    """Images in class folders, `root/<class>/.../<image>`; classes in the order of code points.

    Args:
        root: The folder.
        split: Which part. It is the folder `root/train` or `root/val`, under any usual name, where
            there is one; else a fixed draw from each class.
        val_share: Share of each class that is drawn for `val`.

    Raises:
        ValueError: If there are no class folders, one holds no image, or a part would be empty.
    """
    own = None if split == "all" else split_folder(root, split)
    classes = class_folders(root if own is None else own)
    if own is None and split != "all":
        classes = {
            name: _part(paths, split, val_share, f"class '{name}' of '{root}'")
            for name, paths in classes.items()
        }
    paths = [path for found in classes.values() for path in found]
    labels = [index for index, found in enumerate(classes.values()) for _ in found]
    return _of_files(paths, root, labels, len(classes), tuple(classes))


def unlabelled(root: str) -> Source:
    """Every image anywhere below a folder, in the order of code points, without classes.

    Args:
        root: The folder.

    Raises:
        ValueError: If it cannot be read, or holds no image.
    """
    paths = images_below(root)
    return _of_files(paths, root, [UNKNOWN] * len(paths), 0, None)


def _of_files(
    paths: list[Path], root: str, labels: list[int], number: int, names: ClassNames | None
) -> Source:
    """Files below a folder, called by their paths in it."""
    files = [str(path.relative_to(root)) for path in paths]
    return Source(lambda i: read_file(paths[i]), labels, number, class_names=names, files=files)


def _part(paths: list[Path], split: str, val_share: float, what: str) -> list[Path]:
    """A fixed draw of a class's images for `val`, or the others."""
    num_val = max(1, round(len(paths) * val_share))
    if num_val >= len(paths):
        raise ValueError(
            f"{what} has {len(paths)} images, too few to hold {num_val} back for validation; add "
            "some, lower val_share, or give folders train and val"
        )
    order = np.random.default_rng(0).permutation(len(paths))
    return [paths[i] for i in sorted(order[:num_val] if split == "val" else order[num_val:])]


def timm_source(
    name: str, root: str | None = None, split: str = "validation", download: bool = False
) -> Source:
    """A data set that `timm.data.create_dataset` knows: image folders, torchvision, hub.

    Args:
        name: timm's name, such as `` (an image folder), `torch/cifar10` or `hfds/org/name`.
        root: Folder of the images, or of the download.
        split: Name of the split.
        download: Fetch the set if it is not there.

    Raises:
        ValueError: If images cannot be reached by number, or `datasets` is missing for a hub set.
    """
    if name in ("", "torch/folder", "torch/image_folder"):
        folder = Path(root or ".")
        return image_folder(str(split_folder(folder, split) or folder))
    if name.startswith("hfds/"):
        imported("datasets", "datasets", "read hub sets")
    dataset: Any = create_dataset(name, root=root, split=split, download=download)
    reader: Any = getattr(dataset, "reader", None)
    if hasattr(reader, "label_key"):
        return _of_columns(reader.dataset, reader.image_key, reader.label_key, f"'{name}'")
    if not hasattr(dataset, "targets"):
        raise ValueError(
            f"'{name}' is a stream, whose images cannot be reached by number; use a folder, "
            "`torch/...` or `hfds/...`"
        )
    if hasattr(dataset, "loader"):
        dataset.loader = read_file
    labels = [int(label) for label in dataset.targets]
    names = tuple(map(_spoken, getattr(dataset, "classes", ()))) or None
    number = max(labels) + 1 if names is None else len(names)
    return Source(lambda i: dataset[i][0], labels, number, class_names=names)


def _spoken(name: str | tuple[str, ...]) -> str:
    """A class name of torchvision, which gives several names to those of ImageNet."""
    return class_name(name if isinstance(name, str) else ", ".join(name))

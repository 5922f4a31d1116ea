"""Labelled images from what is at hand: scikit-learn's digits, parquet files, folders with a table.

A source is a map-style dataset of (PIL image, class index) with a `num_classes`. Image folders and
torchvision sets come from `timm_source`, which also downloads where asked to.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data.dataset_factory import create_dataset

Labels = Sequence[int] | np.ndarray


class Source:
    """A dataset of (PIL image, class index).

    Args:
        read: Returns the image at an index.
        labels: Class index of every image.
        num_classes: Number of classes of the task, which may exceed those present.
        ids: What identifies each image, whichever part of the data this is; None numbers them.

    Raises:
        ValueError: If there is no image, or a label lies outside the classes.
    """

    def __init__(
        self,
        read: Callable[[int], Image.Image],
        labels: Labels,
        num_classes: int,
        ids: Sequence[int] | None = None,
    ) -> None:
        if not len(labels):
            raise ValueError("the data set is empty; check the path and the split")
        if min(labels) < 0 or max(labels) >= num_classes:
            raise ValueError(
                f"labels run from {min(labels)} to {max(labels)}, outside the {num_classes} "
                "classes; correct num_classes"
            )
        self.read = read
        self.labels = labels
        self.num_classes = num_classes
        self.ids = range(len(labels)) if ids is None else ids

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.read(index), int(self.labels[index])


def subset(source: Source, indices: Labels) -> Source:
    """Some images of a source, with the ids they have there.

    Args:
        source: The source.
        indices: Which images, in which order.
    """
    labels = [int(source.labels[int(index)]) for index in indices]
    ids = [int(source.ids[int(index)]) for index in indices]
    return Source(lambda i: source.read(int(indices[i])), labels, source.num_classes, ids)


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
    return Source(lambda i: Image.fromarray(pixels[i]), bunch.target[indices], 10)


def parquet(path: str, image: str = "image", label: str = "label") -> Source:
    """A parquet file with a column of encoded images and one of class indices.

    Args:
        path: The file, or a glob of files.
        image: Name of the image column.
        label: Name of the label column.

    Raises:
        ValueError: If there is no such file or column.
    """
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
    table = table.cast_column(image, datasets.Image())
    labels: Any = np.asarray(table[label])
    declared = getattr(table.features[label], "num_classes", None)
    return Source(lambda i: table[i][image], labels, declared or int(labels.max()) + 1)


def labelled_folder(root: str, labels: str, num_classes: int) -> Source:
    """Images anywhere below a folder, with a tab-separated table of their classes.

    Args:
        root: The folder.
        labels: The table, with columns `file`, the image's base name, and `class_index`.
        num_classes: Number of classes of the task.

    Raises:
        ValueError: If the table or an image that it names is missing.
    """
    try:
        with open(labels, newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except FileNotFoundError:
        raise ValueError(
            f"no label table '{labels}'; if it is an asset, is LOWBIT_ASSETS set?"
        ) from None
    if rows and (absent := {"file", "class_index"} - set(rows[0])):
        raise ValueError(f"label table '{labels}' has no column {sorted(absent)}, tab-separated")
    paths = {path.name: path for path in Path(root).rglob("*") if path.is_file()}
    if missing := [row["file"] for row in rows if row["file"] not in paths]:
        raise ValueError(f"'{labels}' names {len(missing)} files not below '{root}': {missing[0]}")
    indices = [int(row["class_index"]) for row in rows]
    return Source(lambda i: Image.open(paths[rows[i]["file"]]), indices, num_classes)


def timm_source(
    name: str, root: str | None = None, split: str = "validation", download: bool = False
) -> Source:
    """Any data set that `timm.data.create_dataset` knows: image folders, torchvision, hub.

    Args:
        name: timm's name, such as `` (an image folder), `torch/cifar10` or `hfds/org/name`.
        root: Folder of the images, or of the download.
        split: Name of the split.
        download: Fetch the set if it is not there.
    """
    dataset: Any = create_dataset(name, root=root, split=split, download=download)
    reader: Any = getattr(dataset, "reader", None)
    if hasattr(reader, "samples"):
        labels = [int(label) for _, label in reader.samples]
        classes = reader.class_to_idx
    elif hasattr(reader, "label_key"):
        labels = [int(label) for label in reader.dataset[reader.label_key]]
        classes = reader.class_to_idx
    else:
        labels = [int(label) for label in dataset.targets]
        classes = getattr(dataset, "classes", ())
    declared = len(classes) or max(labels) + 1
    return Source(lambda i: dataset[i][0], labels, declared)

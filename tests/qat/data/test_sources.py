"""Sources: the right pixels with the right label, and refusal of what is missing."""

import csv
import struct
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from qat.data.sources import Source, digits, labelled_folder, parquet, subset, timm_source

Pixels = np.ndarray


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` writes out of the home folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image)


def _random_images(count: int) -> list[Pixels]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (5, 4, 3), dtype=np.uint8) for _ in range(count)]


def _write_parquet(path: Path, images: list[Pixels], labels: list[int], **features: object) -> None:
    table = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in images], "label": labels},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.Value("int64"), **features}
        ),
    )
    table.to_parquet(path)


def _write_table(path: Path, rows: list[tuple[str, int]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([("class_index", "file"), *((label, name) for name, label in rows)])


def _save(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _content(source: Source) -> Counter[tuple[bytes, int]]:
    return Counter(
        (_pixels(image).tobytes(), label)
        for image, label in map(source.__getitem__, range(len(source)))
    )


def test_digits_splits_divide_the_images_of_scikit_learn_between_them() -> None:
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1437, 360)
    bunch = load_digits()
    # 16 grey levels become 256: 16 * 255/16 = 255, and 8 * 255/16 = 127.5 rounds to even, 128.
    scaled = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    every = Counter((x.tobytes(), int(y)) for x, y in zip(scaled, bunch.target, strict=True))
    assert max(every.values()) == 1  # no image occurs twice, so equal content means disjoint splits
    assert _content(train) + _content(test) == every


def test_digits_pixels_fill_the_range_of_a_byte() -> None:
    values = np.unique([_pixels(image) for image, _ in map(digits("test").__getitem__, range(360))])
    assert values.dtype == np.uint8
    assert (values.min(), values.max(), len(values)) == (0, 255, 17)


def test_digits_classes_have_the_same_share_in_both_splits() -> None:
    total = np.bincount(load_digits().target)
    for split, share in (("train", 1437 / 1797), ("test", 360 / 1797)):
        counts = np.bincount(digits(split).labels, minlength=10)
        assert np.abs(counts - share * total).max() < 1, split


def test_digits_are_the_same_at_every_call() -> None:
    first, second = digits("test"), digits("test")
    assert list(first.labels) == list(second.labels)
    assert all(np.array_equal(first[i][0], second[i][0]) for i in range(360))


def test_unknown_split_of_digits_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="splits 'train' and 'test', not 'validation'"):
        digits("validation")


def test_parquet_returns_the_pixels_and_labels_that_were_written(tmp_path: Path) -> None:
    images, labels = _random_images(4), [2, 0, 1, 2]
    _write_parquet(tmp_path / "a.parquet", images, labels)
    source = parquet(str(tmp_path / "a.parquet"))
    assert (len(source), source.num_classes) == (4, 3)
    for i in (3, 0, 2, 1):
        image, label = source[i]
        assert np.array_equal(_pixels(image), images[i])
        assert label == labels[i]


def test_parquet_with_named_classes_has_all_of_them_even_if_absent(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["cat", "dog", "fox", "owl"])
    _write_parquet(tmp_path / "a.parquet", _random_images(2), [1, 0], label=names)
    assert parquet(str(tmp_path / "a.parquet")).num_classes == 4


def test_parquet_glob_reads_every_file_and_named_columns(tmp_path: Path) -> None:
    images = _random_images(3)
    for name, part, labels in (("a", images[:2], [0, 1]), ("b", images[2:], [2])):
        table = {"pixels": [Image.fromarray(x) for x in part], "class": labels}
        features = {"pixels": datasets.Image(), "class": datasets.Value("int64")}
        made = datasets.Dataset.from_dict(table, features=datasets.Features(features))
        made.to_parquet(tmp_path / f"{name}.parquet")
    source = parquet(str(tmp_path / "*.parquet"), "pixels", "class")
    expected = Counter((x.tobytes(), i) for i, x in enumerate(images))
    assert _content(source) == expected


def test_parquet_file_written_anew_is_read_anew(tmp_path: Path) -> None:
    path, images = tmp_path / "a.parquet", _random_images(4)
    _write_parquet(path, images[:2], [0, 1])
    assert list(parquet(str(path)).labels) == [0, 1]
    _write_parquet(path, images[2:], [1, 0])
    source = parquet(str(path))
    assert list(source.labels) == [1, 0]
    assert np.array_equal(_pixels(source[0][0]), images[2])


@pytest.mark.parametrize("name", ["absent.parquet", "absent*.parquet"])
def test_missing_parquet_file_is_refused_with_its_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"no parquet file '.*absent.*is LOWBIT_ASSETS set\?"):
        parquet(str(tmp_path / name))


@pytest.mark.parametrize(
    ("image", "label", "missing"), [("img", "label", "img"), ("image", "y", "y")]
)
def test_missing_parquet_column_is_refused_with_those_there(
    tmp_path: Path, image: str, label: str, missing: str
) -> None:
    _write_parquet(tmp_path / "a.parquet", _random_images(1), [0])
    message = rf"no column '{missing}', only \['image', 'label'\]"
    with pytest.raises(ValueError, match=message):
        parquet(str(tmp_path / "a.parquet"), image, label)


def test_parquet_without_rows_is_refused_as_empty(tmp_path: Path) -> None:
    _write_parquet(tmp_path / "a.parquet", [], [])
    with pytest.raises(ValueError, match=r"no data|empty"):  # the words of `datasets`, or ours
        parquet(str(tmp_path / "a.parquet"))


def test_labelled_folder_takes_labels_from_the_table_not_from_folders(tmp_path: Path) -> None:
    images = dict(zip(("a/0.png", "a/1.png", "b/deep/2.png"), _random_images(3), strict=True))
    for name, pixels in images.items():
        _save(tmp_path / "images" / name, pixels)
    _save(tmp_path / "images" / "b" / "unlisted.png", images["a/0.png"])
    # Neither folder nor file order agrees with the classes, and the table has another order.
    _write_table(tmp_path / "labels.tsv", [("2.png", 0), ("0.png", 4), ("1.png", 1)])
    source = labelled_folder(str(tmp_path / "images"), str(tmp_path / "labels.tsv"), 6)
    assert (len(source), source.num_classes) == (3, 6)
    expected = [("b/deep/2.png", 0), ("a/0.png", 4), ("a/1.png", 1)]
    for i, (name, label) in enumerate(expected):
        image, found = source[i]
        assert np.array_equal(_pixels(image), images[name])
        assert found == label


def test_missing_label_table_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no label table '.*absent\.tsv'.*LOWBIT_ASSETS set\?"):
        labelled_folder(str(tmp_path), str(tmp_path / "absent.tsv"), 2)


def test_images_missing_below_the_folder_are_counted_and_the_first_named(tmp_path: Path) -> None:
    _save(tmp_path / "here.png", _random_images(1)[0])
    _write_table(tmp_path / "labels.tsv", [("here.png", 0), ("gone.png", 1), ("lost.png", 1)])
    with pytest.raises(ValueError, match=r"names 2 files not below '.*': gone\.png"):
        labelled_folder(str(tmp_path), str(tmp_path / "labels.tsv"), 2)


@pytest.mark.parametrize(("label", "accepted"), [(-1, False), (0, True), (2, True), (3, False)])
def test_label_outside_the_classes_is_refused(tmp_path: Path, label: int, accepted: bool) -> None:
    _save(tmp_path / "x.png", _random_images(1)[0])
    _write_table(tmp_path / "labels.tsv", [("x.png", label)])
    arguments = str(tmp_path), str(tmp_path / "labels.tsv"), 3
    if accepted:
        assert [found for _, found in _content(labelled_folder(*arguments))] == [label]
    else:
        message = f"row 2: the class index is '{label}', expected .* from 0 to 2"
        with pytest.raises(ValueError, match=message):
            labelled_folder(*arguments)


def test_table_without_rows_is_refused_as_empty(tmp_path: Path) -> None:
    _write_table(tmp_path / "labels.tsv", [])
    with pytest.raises(ValueError, match="the data set is empty; check the path and the split"):
        labelled_folder(str(tmp_path), str(tmp_path / "labels.tsv"), 2)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm leaves files to PIL
def test_image_folder_has_the_classes_of_its_sorted_folder_names(tmp_path: Path) -> None:
    images = _random_images(3)
    for name, pixels in zip(("owl/a.png", "cat/b.png", "owl/c.png"), images, strict=True):
        _save(tmp_path / "train" / name, pixels)
    _save(tmp_path / "val" / "cat" / "other.png", 255 - images[0])
    _save(tmp_path / "val" / "owl" / "other.png", 255 - images[1])
    source = timm_source("", str(tmp_path), "train")
    assert source.num_classes == 2
    expected = Counter((x.tobytes(), label) for x, label in zip(images, (1, 0, 1), strict=True))
    assert _content(source) == expected


def test_torchvision_set_on_disk_is_read_without_download(tmp_path: Path) -> None:
    images = np.stack([x[..., 0] for x in _random_images(3)])
    labels = np.array([7, 0, 3], np.uint8)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        header = struct.pack(">4i", 0x803, *images.shape)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">2i", 0x801, len(labels))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    source = timm_source("torch/mnist", str(tmp_path), "validation")
    assert source.num_classes == 10
    for i, label in enumerate(labels):
        image, found = source[i]
        assert np.array_equal(_pixels(image), images[i])
        assert found == label


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm leaves files to PIL
def test_hub_set_is_read_with_its_labels(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    images, names = _random_images(2), datasets.ClassLabel(names=["cat", "dog", "fox"])
    _write_parquet(tmp_path / "hub" / "train.parquet", images, [2, 0], label=names)
    # A folder stands for the hub: `datasets` reads both by the same call.
    source = timm_source(f"hfds/{tmp_path}/hub", str(tmp_path / "cache"), "train")
    assert source.num_classes == 3
    assert _content(source) == Counter({(images[0].tobytes(), 2): 1, (images[1].tobytes(), 0): 1})


def test_source_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="the data set is empty; check the path and the split"):
        Source(lambda i: Image.new("L", (1, 1)), [], 10)


def test_subset_keeps_the_order_it_is_given_and_the_classes_of_the_whole() -> None:
    whole, indices = digits("test"), [300, 4, 17, 4]
    part = subset(whole, indices)
    assert (len(part), part.num_classes) == (4, 10)
    for position, index in enumerate(indices):
        assert np.array_equal(_pixels(part[position][0]), _pixels(whole[index][0]))
        assert part[position][1] == part.labels[position] == whole[index][1]


def test_subset_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="the data set is empty"):
        subset(digits("test"), [])

"""Folders: what is an image, of which class, in which order; what is left out is said."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from qat.data.listing import class_folders, class_name, extensions, split_folder
from qat.data.sources import image_folder, timm_source


def put(root: Path, *names: str) -> Path:
    """Small pictures, or other files, by path below a root."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif"):
            Image.new("RGB", (4, 4)).save(path)
        else:
            path.write_text("no image")
    return root


def listed(root: Path) -> dict[str, list[str]]:
    folders = class_folders(root)
    return {name: [path.name for path in paths] for name, paths in folders.items()}


def test_classes_and_images_are_in_the_order_of_code_points(tmp_path: Path) -> None:
    put(tmp_path, "Zebra/b.png", "apple/10.png", "apple/2.png", "10/a.png", "2/a.png", "1/a.png")
    assert list(listed(tmp_path)) == ["1", "10", "2", "Zebra", "apple"]
    assert listed(tmp_path)["apple"] == ["10.png", "2.png"]


def test_both_ways_to_a_folder_and_the_folders_of_a_stream_number_alike(tmp_path: Path) -> None:
    from qat.data.official import ImageNetC

    names = [f"{name}/a.png" for name in ("Zebra", "apple", "10", "2")]
    put(tmp_path / "val", *names)
    put(tmp_path / "c" / "fog" / "5", *names)
    found = [
        image_folder(str(tmp_path / "val")).class_names,
        timm_source("", str(tmp_path), "validation").class_names,
        timm_source("torch/image_folder", str(tmp_path), "validation").class_names,
        ImageNetC(str(tmp_path / "c"), num_classes=4).class_names,
    ]
    assert found == [("10", "2", "Zebra", "apple")] * 4


LITTER = (
    ".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/a-checkpoint.png",
    "__MACOSX/a.png", "._photo.jpg", ".hidden/x.png", "@eaDir/thumb.jpg",
)  # fmt: skip


@pytest.mark.parametrize("litter", LITTER)
@pytest.mark.parametrize("place", [".", "cat", "cat/deep"])
def test_what_systems_leave_behind_is_ignored(tmp_path: Path, litter: str, place: str) -> None:
    put(tmp_path, "cat/a.png", "cat/deep/b.png", "dog/a.png")
    (tmp_path / place / litter).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place / litter).write_bytes(b"litter")
    assert listed(tmp_path) == {"cat": ["a.png", "b.png"], "dog": ["a.png"]}


def test_every_extension_that_pillow_reads_is_read_in_any_case(tmp_path: Path) -> None:
    names = ("a.JPG", "b.Jpeg", "c.webp", "d.gif", "e.bmp", "f.tif", "g.PNG")
    put(tmp_path, *(f"cat/{name}" for name in names))
    source = image_folder(str(tmp_path))
    assert len([source[i] for i in range(len(source))]) == len(names)
    assert source.files == [f"cat/{name}" for name in sorted(names)]
    assert {".jp2", ".ppm", ".tiff", ".jfif", ".qoi", ".avif"} <= extensions()
    assert not {".pdf", ".h5", ".mpg", ".npy", ".txt"} & extensions()


def test_other_files_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    put(tmp_path, "cat/a.png", "cat/notes.txt", "cat/x.npy", "cat/y.npy", "README.md")
    with pytest.warns(UserWarning, match=r"4 files of other kinds are left out.*\(2 \.npy, "):
        assert listed(tmp_path) == {"cat": ["a.png"]}
    put(tmp_path, "cover.png")
    with pytest.warns(UserWarning) as told:
        class_folders(tmp_path)
    assert "1 files in no class folder are left out, the first is 'cover.png'" in str(
        told[0].message
    )


def linked(root: Path) -> None:
    put(root, "elsewhere/photos/b.png", "data/dog/a.png")
    (root / "data" / "cat").symlink_to(root / "elsewhere" / "photos")
    (root / "data" / "dog" / "b.png").symlink_to(root / "elsewhere" / "photos" / "b.png")
    (root / "data" / "dog" / "again").symlink_to(root / "data")


def test_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    linked(tmp_path)
    assert listed(tmp_path / "data") == {"cat": ["b.png"], "dog": ["a.png", "b.png"]}


def test_link_to_nothing_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    put(tmp_path, "cat/a.png")
    (tmp_path / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    source = image_folder(str(tmp_path))
    assert len(source) == 2
    with pytest.raises(ValueError, match=r"gone\.jpg' cannot be read: FileNotFoundError"):
        source.image(1)


def test_names_that_are_no_text_or_written_otherwise_are_the_same_everywhere(
    tmp_path: Path,
) -> None:
    os.makedirs(os.fsencode(tmp_path) + b"/\xe9t\xe9")
    put(tmp_path, "caf\u00e9/a.png")
    shutil.copy(tmp_path / "caf\u00e9" / "a.png", os.fsencode(tmp_path) + b"/\xe9t\xe9/x\xff.png")
    names = list(class_folders(tmp_path))
    assert all(name.encode("utf-8") for name in names)
    assert class_name("cafe\u0301") in names  # as a Mac writes it
    source = image_folder(str(tmp_path))
    assert [source[i][1] for i in range(2)] == [0, 1]


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda root: None, r"image folder '.*data' cannot be read .*LOWBIT_ASSETS set"),
    "empty": (lambda root: root.mkdir(), r"holds 0 images but no class folder; expected <class>"),
    "flat": (lambda root: put(root, "a.png", "b.png"), r"holds 2 images but no class folder"),
    "class without images": (
        lambda root: (put(root, "cat/a.png"), (root / "dog").mkdir()),
        r"class folder '.*dog' holds no image that Pillow reads; fill or remove it",
    ),
    "class of another format": (
        lambda root: put(root, "cat/a.png", "dog/a.heic", "dog/b.HEIC"),
        r"class folder '.*dog' holds no image that Pillow reads \(2 \.heic\).* convert its images",
    ),
    "parts in place of classes": (
        lambda root: put(root, "train/cat/a.png", "val/cat/a.png"),
        r"holds 'train', which is a part of a data set and no class; name '.*train'",
    ),
    "a file": (lambda root: root.write_text("x"), "cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_folder_that_holds_no_classes_is_refused_with_what_is_there(
    tmp_path: Path, case: str
) -> None:
    make, message = WRONG[case]
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        image_folder(str(tmp_path / "data"))


def test_class_may_be_called_test_if_it_holds_images(tmp_path: Path) -> None:
    put(tmp_path, "test/a.png", "control/a.png")
    assert list(listed(tmp_path)) == ["control", "test"]


def test_images_anywhere_below_a_class_folder_are_of_that_class(tmp_path: Path) -> None:
    put(tmp_path, "cat/2023/may/a.png", "cat/b.png", "dog/cat/c.png")
    assert listed(tmp_path) == {"cat": ["a.png", "b.png"], "dog": ["c.png"]}


@pytest.mark.parametrize(
    ("there", "split"), [("valid", "val"), ("training", "train"), ("test", "val"), ("val", "val")]
)
def test_part_is_found_under_its_usual_names(tmp_path: Path, there: str, split: str) -> None:
    put(tmp_path, f"{there}/cat/a.png")
    assert split_folder(tmp_path, split) == tmp_path / there
    assert len(image_folder(str(tmp_path), split)) == 1  # type: ignore[arg-type]


def test_folder_without_parts_is_divided_by_class_and_always_alike(tmp_path: Path) -> None:
    put(tmp_path, *(f"cat/{i}.png" for i in range(10)), *(f"dog/{i}.png" for i in range(5)))
    parts = {split: image_folder(str(tmp_path), split) for split in ("train", "val", "all")}  # type: ignore[arg-type]
    assert [list(parts[s].labels) for s in ("val", "train")] == [
        [0, 0, 1],
        [0] * 8 + [1] * 4,
    ]
    again = image_folder(str(tmp_path), "val")
    assert list(again.labels) == list(parts["val"].labels)
    assert len(parts["all"]) == 15
    put(tmp_path, "owl/a.png")
    with pytest.raises(ValueError, match=r"class 'owl' of .* has 1 images, too few to hold 1 back"):
        image_folder(str(tmp_path), "train")

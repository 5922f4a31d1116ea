"""Which files below a folder are images, and of which class.

Hidden files and what systems leave behind are ignored, in files and folders alike. An image is what
ends in any extension that the installed Pillow reads, in upper or lower case. Links are followed.
"""

import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from qat.reading import shown

LITTER = frozenset((
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "__pycache__", "@eadir",
    "#recycle", "$recycle.bin", "system volume information", "lost+found",
))  # fmt: skip
"""Names that systems leave behind, in lower case; beside those that begin with a dot."""
NO_PICTURES = frozenset(("BUFR", "GRIB", "HDF5", "MPEG", "WMF"))
"""Formats that Pillow recognizes and does not decode."""
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "test", "testing"),
}
"""Usual names of the folders of each part of a data set."""


@cache
def extensions() -> frozenset[str]:
    """Extensions of images, in lower case."""
    known = Image.registered_extensions().items()
    return frozenset(ext for ext, name in known if name in Image.OPEN and name not in NO_PICTURES)


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name."""
    return path.suffix.lower() in extensions()


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every file below a folder that is not hidden, in the order of code points.

    Args:
        folder: The folder.
        above: Real folders that it lies in; a link back to one of them is not followed.
    """
    real = folder.resolve()
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                yield from files_below(folder / entry.name, (*above, real))
            else:
                yield folder / entry.name


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is none of the user's."""
    return name.startswith(".") or name.lower() in LITTER


def class_folders(root: str | Path) -> dict[str, list[Path]]:
    """The images of each class, `root/<class>/.../<image>`, classes in the order of code points.

    Other files are left out, counted and the first of them named.

    Raises:
        ValueError: If there is no class, or one without images, or a folder is a part of a data set
            rather than a class.
    """
    root = Path(root)
    files = listed(root)
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()]
    classes = {path.name: list[Path]() for path in folders if not is_hidden(path.name)}
    for path in filter(is_image, files):
        if path.parent != root:
            classes[path.relative_to(root).parts[0]].append(path)
    _require_classes(root, classes, files)
    _tell_left_out(root, files)
    return _by_name(classes)


def images_below(root: str | Path) -> list[Path]:
    """Every image below a folder, in the order of code points.

    Raises:
        ValueError: If the folder cannot be read, or there is none in it.
    """
    files = listed(Path(root))
    images = [path for path in files if is_image(path)]
    if not images:
        raise ValueError(
            f"'{shown(Path(root))}' holds no image that Pillow reads{_kinds(files)}; name the "
            "folder of the photos"
        )
    return images


def listed(root: Path) -> list[Path]:
    """Every file below a folder of images that is not hidden, in the order of code points.

    Raises:
        ValueError: If the folder cannot be read.
    """
    try:
        return list(files_below(root))
    except OSError as error:
        raise ValueError(
            f"image folder '{shown(root)}' cannot be read ({error.strerror}); if it is an asset, "
            "is LOWBIT_ASSETS set?"
        ) from None


def split_folder(root: str | Path, split: str) -> Path | None:
    """The folder of a part of a data set, under any of its usual names; None if there is none."""
    usual = next((names for names in SPLITS.values() if split in names), ())
    found = (Path(root) / name for name in (split, *usual))
    return next((path for path in found if path.is_dir()), None)


def _require_classes(root: Path, classes: dict[str, list[Path]], files: Sequence[Path]) -> None:
    if not classes:
        holds = f"{sum(map(is_image, files))} images but no class folder"
        raise ValueError(
            f"'{shown(root)}' holds {holds}; expected <class>/<image> in it, or a table of labels, "
            "see qat.data.sources.labelled_folder"
        )
    for name, images in classes.items():
        direct = any(path.parent == root / name for path in images)
        if any(name.lower() in names for names in SPLITS.values()) and not direct:
            raise ValueError(
                f"'{shown(root)}' holds '{name}', which is a part of a data set and no class; name "
                f"'{shown(root / name)}', or use qat.data.sources.image_folder with a split"
            )
        if not images:
            others = _kinds([path for path in files if (root / name) in path.parents])
            raise ValueError(
                f"class folder '{shown(root / name)}' holds no image that Pillow reads{others}; "
                "fill or remove it, or convert its images to JPEG or PNG"
            )


def _tell_left_out(root: Path, files: Sequence[Path]) -> None:
    """Say which files have no part in the data."""
    loose = [path for path in files if is_image(path) and path.parent == root]
    others = [path for path in files if not is_image(path)]
    for paths, what in ((loose, "in no class folder"), (others, "of other kinds")):
        if paths:
            first = shown(paths[0].relative_to(root))
            warnings.warn(
                f"'{shown(root)}': {len(paths)} files {what} are left out, the first is '{first}'"
                f"{_kinds(paths)}",
                stacklevel=4,
            )


def _kinds(paths: Sequence[Path]) -> str:
    """Extensions of some files and how many have each."""
    counts = Counter(shown(path.suffix.lower()) or "no extension" for path in paths)
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(5))
    return f" ({listed})" if paths else ""


def _by_name(classes: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Classes by names that are written alike on every system, in the order of code points."""
    names = {name: class_name(name) for name in classes}
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise ValueError(f"two class folders are called '{twice[0]}', in other bytes; merge them")
    return {names[name]: classes[name] for name in sorted(classes, key=names.__getitem__)}


def class_name(folder: str) -> str:
    """The name of a class from that of its folder, whose accents systems encode differently."""
    return unicodedata.normalize("NFC", shown(folder))

"""Tables of labels: a row names an image and its class; each mistake is named by its row."""

import csv
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qat.data.classes import ClassNames
from qat.data.listing import class_name, listed
from qat.reading import shown

Rows = list[tuple[int, dict[str, str | None]]]
"""Number of each row, the header being 1, and its cells by column."""
Where = Callable[[int], str]
"""Says where the label at a position comes from."""
FILE, INDEX, NAME = "file", "class_index", "class_name"


def read_table(path: str) -> Rows:
    """The rows of a table that is separated by tabs or commas.

    Raises:
        ValueError: If it is missing, no text, or has no column of files or none of classes.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter="\t" if "\t" in header else ",")
            rows = [(reader.line_num, row) for row in reader]
    except FileNotFoundError:
        raise ValueError(
            f"no label table '{path}'; if it is an asset, is LOWBIT_ASSETS set?"
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"label table '{path}' cannot be read: {error}") from None
    columns = reader.fieldnames or []
    absent = [name for name in (FILE, INDEX) if name not in columns]
    if rows and absent and not (absent == [INDEX] and NAME in columns):
        raise ValueError(
            f"label table '{path}' has no column {absent}, only {list(columns)}; expected columns "
            f"'{FILE}' and '{INDEX}' or '{NAME}', separated by tabs or commas"
        )
    return rows


def classes_of(
    rows: Rows, path: str, num_classes: int | None
) -> tuple[list[int], ClassNames | None]:
    """Class index of every row, and class names where the table has these in place of indices.

    Raises:
        ValueError: Naming the row whose class is missing, no index, or outside the classes; or if
            there is another number of names.
    """

    def where(row: int) -> str:
        return f"'{path}', row {rows[row][0]}"

    if not rows or INDEX in rows[0][1]:
        return indices([row[INDEX] for _, row in rows], where, num_classes), None
    labels, names = named([row[NAME] for _, row in rows], where)
    if num_classes not in (None, len(names)):
        raise ValueError(
            f"'{path}' names {len(names)} classes, num_classes is {num_classes}; correct it or "
            "leave it out"
        )
    return labels, names


def named(values: Sequence[str | None], where: Where) -> tuple[list[int], ClassNames]:
    """Class index of every name, and the names in the order of code points.

    Raises:
        ValueError: Naming the first place that has no name.
    """
    found = [class_name((value or "").strip()) for value in values]
    if "" in found:
        raise ValueError(f"{where(found.index(''))}: the class name is missing")
    names = tuple(sorted(set(found)))
    places = {name: place for place, name in enumerate(names)}
    return [places[name] for name in found], names


def indices(values: Sequence[Any], where: Where, num_classes: int | None) -> list[int]:
    """Labels as whole numbers within the classes.

    Args:
        values: Labels, as text or numbers.
        where: Says where the label of a position comes from.
        num_classes: Number of classes; None where it is not known.

    Raises:
        ValueError: Naming the first place whose label is none.
    """
    found = [_index(value, num_classes) for value in values]
    if None in found:
        place = found.index(None)
        expected = "of 0 or more" if num_classes is None else f"from 0 to {num_classes - 1}"
        raise ValueError(
            f"{where(place)}: the class index is {values[place]!r}, expected a whole number "
            f"{expected}; correct the label, or num_classes"
        )
    return [label for label in found if label is not None]


def _index(value: Any, num_classes: int | None) -> int | None:
    """A label as a whole number within the classes; None if it is none."""
    text = str(value).strip()
    valid = text.isdecimal() and (num_classes is None or int(text) < num_classes)
    return int(text) if valid else None


def files_of(rows: Rows, path: str, root: str) -> list[Path]:
    """The file of every row: by its path below the root, or by a base name that is there once.

    Raises:
        ValueError: If a file is missing, ambiguous, or in several rows.
    """
    by_name = defaultdict(list)
    for file in listed(Path(root)):
        by_name[file.name].append(file)
    names = [(row[FILE] or "").strip() for _, row in rows]
    found = [_candidates(Path(root), name, by_name) for name in names]
    if missing := [name for name, files in zip(names, found, strict=True) if not files]:
        raise ValueError(f"'{path}' names {len(missing)} files not below '{root}': {missing[0]}")
    seen: dict[Path, int] = {}
    for (number, _), name, files in zip(rows, names, found, strict=True):
        if len(files) > 1:
            both = " and ".join(f"'{shown(file.relative_to(root))}'" for file in files[:2])
            raise ValueError(
                f"'{path}', row {number}: '{name}' may be {both}; give paths relative to '{root}'"
            )
        if files[0] in seen:
            raise ValueError(
                f"'{path}', rows {seen[files[0]]} and {number}: both name '{name}'; remove one"
            )
        seen[files[0]] = number
    return list(seen)


def _candidates(root: Path, name: str, by_name: dict[str, list[Path]]) -> list[Path]:
    direct = root / name
    return [direct] if name and direct.is_file() else by_name.get(name, [])

"""Class names: which index is which class, compared by name wherever both sides have names.

Indices follow names in the order of code points, as torchvision's do: `Zebra` before `apple`,
`10` before `2`. A data set that declares an order of its own, such as a parquet file with class
labels, keeps it.
"""

from collections.abc import Sequence

import numpy as np

ClassNames = tuple[str, ...]
Labels = Sequence[int] | np.ndarray


def relabelled(
    labels: Labels,
    found: ClassNames | None,
    wanted: ClassNames | None,
    what: str,
    complete: bool = False,
) -> Labels:
    """Labels as indices into other names, matched by name.

    Args:
        labels: Indices into `found`.
        found: Class names of the labels; None where they have none.
        wanted: Class names to index; None where there are none. Without both, labels stay.
        what: What the labels are of, for the message.
        complete: Whether every wanted class must be found.

    Raises:
        ValueError: Naming the classes that only one side has.
    """
    if found is None or wanted is None or found == wanted:
        return labels
    unknown = [name for name in found if name not in wanted]
    absent = [name for name in wanted if name not in found]
    if unknown or (complete and absent):
        raise ValueError(
            f"{what} has other classes than the model or data.train: it alone has "
            f"{listed(unknown)}, it lacks {listed(absent)}; classes are compared by name, so "
            "rename the folders, or take the model and data that belong together"
        )
    places = np.array([wanted.index(name) for name in found])
    return places[np.asarray(labels, dtype=np.int64)]


def require_number(found: int, wanted: int, names: ClassNames | None) -> None:
    """Refuse data with another number of classes than the model.

    Raises:
        ValueError: With both numbers, and the names of the data's classes.
    """
    if found != wanted:
        named = f" ({listed(names)})" if names else ""
        raise ValueError(
            f"the model has {wanted} classes, the data has {found}{named}; give data of the "
            f"model's classes, or train a model with model.model.num_classes {found}"
        )


def listed(names: Sequence[str]) -> str:
    """The first class names of some, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(f"'{name}'" for name in names[:5]) or "none") + more

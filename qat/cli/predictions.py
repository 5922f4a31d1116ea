"""`predictions.csv`: a row for each image that is answered, of whose class nobody knows."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

COLUMNS: tuple[str, ...] = ("image", "class", "index", "confidence", "refused")


def predicted(
    image: str, logits: Float[Tensor, " c"], class_names: Sequence[str]
) -> dict[str, Any]:
    """The row of an image: its class, the class's place among the outputs, its softmax share.

    Args:
        image: What the image is called.
        logits: The answer.
        class_names: What the classes are called.
    """
    confidence, index = logits.softmax(0).max(0)
    answer = (class_names[int(index)], int(index), f"{float(confidence):.6f}", "")
    return dict(zip(COLUMNS, (image, *answer), strict=True))


def refused(image: str, fault: str) -> dict[str, Any]:
    """The row of an image that has no answer, with the reason."""
    return dict.fromkeys(COLUMNS, "") | {"image": image, "refused": fault}

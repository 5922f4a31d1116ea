"""`predictions.csv`: a row for each image that is answered, of whose class nobody knows."""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

COLUMNS: tuple[str, ...] = ("image", "class", "index", "confidence", "refused")


def predictions(
    images: Sequence[str],
    logits: Float[Tensor, "n c"],
    faults: Sequence[str | None],
    class_names: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Rows of a batch: the class, its place among the outputs, and its share in the softmax.

    Args:
        images: What each image is called.
        logits: The answers; a row of a refused image means nothing.
        faults: Why an image was refused, None where it was not.
        class_names: What the classes are called.
    """
    confidences, classes = logits.softmax(1).max(1)
    for image, confidence, index, fault in zip(
        images, confidences.tolist(), classes.tolist(), faults, strict=True
    ):
        row = dict.fromkeys(COLUMNS, "") | {"image": image}
        answer = {"class": class_names[index], "index": index, "confidence": f"{confidence:.6f}"}
        yield row | (answer if fault is None else {"refused": fault})

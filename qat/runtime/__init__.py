"""Runs a packed model with NumPy; no torch in the process.

Images in float32, preprocessed, (batch, channels, height, width), give logits; files of images give
class names and confidences:

    model = qat.runtime.load("model.lowbit")
    logits = model(images)
    answers = model.predict(["cat.jpg"])
"""

from pathlib import Path

from qat import kernels
from qat.packed import Packed, read
from qat.runtime.model import Model, Prediction
from qat.runtime.operations import REFERENCE, Operations

__all__ = ["REFERENCE", "Model", "Operations", "Prediction", "load", "run"]


def load(path: str | Path, operations: Operations | None = None) -> Model:
    """The model in a packed file.

    Args:
        path: The file.
        operations: The table of operations; None takes native kernels where there are any, and the
            reference for the rest.

    Raises:
        ValueError: If the file is damaged, foreign or inconsistent.
    """
    return run(read(path), path, operations)


def run(packed: Packed, path: str | Path, operations: Operations | None = None) -> Model:
    """The model of a packed file that has been read; the arguments and errors are those of `load`.

    Nothing larger than the file's own tensors, unpacked, is made before all of it is checked.
    """
    table = operations or {**REFERENCE, **kernels.operations()}
    try:
        return Model(packed, table)
    except ValueError as error:
        raise ValueError(f"packed file '{path}': {error}") from None
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(f"packed file '{path}' is inconsistent ({error!r:.160})") from None

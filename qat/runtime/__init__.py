"""Runs a packed model with NumPy alone; no torch in the process.

model = qat.runtime.load("model.lowbit")
logits = model(images)                  # float32, preprocessed, (batch, channels, h, w)
answers = model.predict(["cat.jpg"])    # class names and confidences
"""

from pathlib import Path

from qat.packed import read
from qat.runtime.model import Model, Prediction
from qat.runtime.operations import REFERENCE, Operations

__all__ = ["REFERENCE", "Model", "Operations", "Prediction", "load"]


def load(path: str | Path, operations: Operations = REFERENCE) -> Model:
    """The model in a packed file.

    Args:
        path: The file.
        operations: The table of operations; entries of another table than the reference's run
            natively.

    Raises:
        ValueError: If the file is damaged, foreign or inconsistent.
    """
    packed = read(path)
    try:
        return Model(packed, operations)
    except ValueError as error:
        raise ValueError(f"packed file '{path}': {error}") from None
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(f"packed file '{path}' is inconsistent ({error!r:.160})") from None

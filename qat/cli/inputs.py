"""Images as a model takes them: those a recipe evaluates, and what the runtime makes of others."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

import numpy as np
from PIL import Image
from torch import Tensor, nn

from qat.calibrate import Batch
from qat.cli.session import Session
from qat.preprocessing import Preprocessing
from qat.runtime.images import Images


def evaluation_inputs(session: Session, model: nn.Module) -> Iterator[Batch]:
    """Batches of what the recipe evaluates, preprocessed."""
    data = session.data()
    data.follow(model)
    return session.task().inputs(data)


def preparing(preprocessing: Preprocessing) -> Callable[[Image.Image], np.ndarray]:
    """What the runtime does to an image before a model sees it.

    Raises:
        ValueError: If it does not know such preprocessing.
    """
    card = {"preprocessing": preprocessing.to_dict()}
    return Images.of_card(card, preprocessing.input_size).prepare


def first(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """The first images of batches, one by one; all batches for a count of 0."""
    if not count:
        return iter(batches)
    parts = ((batch,) if isinstance(batch, Tensor) else batch for batch in batches)
    images = chain.from_iterable(zip(*(x.split(1) for x in part), strict=True) for part in parts)
    return islice(images, count)

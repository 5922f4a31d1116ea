"""`predict`: classes and confidences of images without labels, by a checkpoint or exported file."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.cli import LightningArgumentParser

from qat import disk, runtime
from qat.card import card_of, expected_by
from qat.cli.arguments import add_run_arguments, add_training_arguments
from qat.cli.console import console
from qat.cli.inputs import preparing
from qat.cli.predictions import predicted, refused
from qat.cli.session import Session
from qat.cli.start import model_in, require_calibrated
from qat.data.sources import Source
from qat.models import num_classes_of
from qat.packed import is_packed
from qat.reading import Unreadable

NUM_NAMED = 10
"""Refused images that are printed; the table has all."""
Logits = Callable[[np.ndarray], np.ndarray]
Prepare = Callable[[Image.Image], np.ndarray]


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `predict`: those of `fit`, so that its recipes serve both."""
    add_run_arguments(parser)
    add_training_arguments(parser)


def run(session: Session) -> None:
    """Write `predictions.csv`, a row an image, and `metrics.json`.

    Raises:
        ValueError: If a model is missing, or no image can be read.
    """
    config, folder = session.config, session.folder
    if config.ckpt_path is None:
        raise ValueError(
            "nothing to predict with: name a checkpoint, packed or ONNX file, --ckpt_path F"
        )
    session.require_new()
    session.prepare()
    source = session.data().val
    rows = list(predictions(source, *answering(config.ckpt_path)))
    faults = [row["refused"] for row in rows if row["refused"]]
    for fault in faults[:NUM_NAMED]:
        console.print(f"refused: {fault}", highlight=False)
    if len(faults) == len(rows):
        raise ValueError(f"none of the {len(rows)} images can be read")
    folder.path.mkdir(parents=True, exist_ok=True)
    disk.write(folder.path / "predictions.csv", disk.csv_of(rows))
    counts = {"n_images": len(rows), "n_refused": len(faults), "n_labelled": 0}
    folder.write_metrics(session.items("cpu") | counts)
    console.print(f"predictions of {len(rows):,} images: {folder.path}/predictions.csv")


def answering(path: str) -> tuple[Logits, Sequence[str], Prepare]:
    """What gives logits of images, the names of its classes, and what prepares an image."""
    if is_packed(path):
        packed = runtime.load(path)
        return packed, packed.class_names, packed.images.prepare
    model = model_in(path)
    require_calibrated(model, path)
    card = card_of(model)
    names, dtype = card.class_names or range(num_classes_of(model)), card.dtype

    @torch.inference_mode()
    def logits(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images).to(dtype)).float().numpy()

    return logits, [str(name) for name in names], preparing(expected_by(model))


def predictions(
    source: Source, logits: Logits, names: Sequence[str], prepare: Prepare
) -> Iterator[dict[str, Any]]:
    """A row for each image; of one that cannot be read, the reason."""
    for index in range(len(source)):
        name = f"image {index}" if source.files is None else source.files[index]
        try:
            image = source.image(index)
        except Unreadable as error:
            yield refused(name, str(error))
            continue
        yield predicted(name, torch.from_numpy(logits(prepare(image)[None])[0]), names)

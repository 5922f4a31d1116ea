"""`predict`: classes and confidences of images without labels, by a checkpoint or a packed file."""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.cli import LightningArgumentParser

from qat import checkpoint as files
from qat import runtime
from qat.card import card_of, expected_by
from qat.cli.arguments import add_run_arguments
from qat.cli.console import console
from qat.cli.packing import image_files, preparing
from qat.cli.session import Session
from qat.cli.start import require_calibrated
from qat.models import num_classes_of
from qat.packed import is_packed
from qat.runtime.images import open_image
from qat.runtime.operations import softmax

COLUMNS: tuple[str, ...] = ("image", "class", "index", "confidence", "refused")
Logits = Callable[[np.ndarray], np.ndarray]


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `predict`: a model and a folder; it needs no recipe."""
    add_run_arguments(parser)
    parser.add_argument("--images", type=str | None, default=None, help="Folder of the images.")


def run(session: Session) -> None:
    """Write `predictions.csv`, a row an image, and `metrics.json`.

    Raises:
        ValueError: If a model or images are missing, or no image can be read.
    """
    config, folder = session.config, session.folder
    if config.ckpt_path is None or config.images is None:
        raise ValueError("predict needs a model, --ckpt_path F, and images, --images DIR")
    session.require_new()
    session.prepare()
    paths = image_files(config.images)
    logits, names, prepare = answering(config.ckpt_path)
    rows = list(predictions(paths, logits, names, prepare))
    refused = [row for row in rows if row["refused"]]
    for row in refused[:10]:
        console.print(f"refused: {row['refused']}", highlight=False)
    if len(refused) == len(rows):
        raise ValueError(f"none of the {len(rows)} images below '{config.images}' can be read")
    folder.path.mkdir(parents=True, exist_ok=True)
    with open(folder.path / "predictions.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    counts = {"n_images": len(rows) - len(refused), "n_refused": len(refused), "n_labelled": 0}
    folder.write_metrics(session.items("cpu") | counts)
    console.print(f"predictions of {counts['n_images']:,} images: {folder.path}/predictions.csv")


def answering(path: str) -> tuple[Logits, Sequence[str], Callable[[Any], np.ndarray]]:
    """What gives logits of images, the names of its classes, and what prepares an image."""
    if is_packed(path):
        packed = runtime.load(path)
        return packed, packed.class_names, packed.images.prepare
    model = files.load(path)
    require_calibrated(model, path)
    names = card_of(model).class_names or range(num_classes_of(model))

    @torch.inference_mode()
    def logits(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images)).float().numpy()

    return logits, [str(name) for name in names], preparing(expected_by(model))


def predictions(
    paths: Sequence[Path],
    logits: Logits,
    names: Sequence[str],
    prepare: Callable[[Any], np.ndarray],
) -> Iterator[dict[str, Any]]:
    """A row for each image; of one that cannot be read, the reason."""
    for path in paths:
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"image": str(path)}
        try:
            confidences = softmax(logits(prepare(open_image(path))[None]))[0]
        except ValueError as error:
            yield row | {"refused": str(error)}
            continue
        best = int(confidences.argmax())
        yield row | {"class": names[best], "index": best, "confidence": f"{confidences[best]:.6f}"}

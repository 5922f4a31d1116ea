"""What experiment trackers get of a run beside numbers: tables, pictures, the model where asked."""

from collections.abc import Iterator
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from qat.cli.tables import is_table


@singledispatch
def exhibit(logger: Logger, folder: Path, items: dict[str, Any]) -> None:
    """Give a tracker what a run leaves: nothing where its kind takes numbers alone.

    Args:
        logger: The tracker.
        folder: The run folder, of which pictures and models are taken.
        items: What `metrics.json` says, of which tables are taken.
    """


@exhibit.register
def _(logger: WandbLogger, folder: Path, items: dict[str, Any]) -> None:
    for key, columns, cells in tables(items):
        logger.log_table(key, columns, cells)
    for picture in pictures(folder):
        logger.log_image(picture.stem, [str(picture)])
    if logger._log_model:  # W&B's own setting `log_model`, which `fit` follows by itself
        for model in sorted(folder.glob("*.ckpt")):
            run = logger.experiment
            run.log_model(str(model), f"{model.stem}-{run.id}")


@exhibit.register
def _(logger: TensorBoardLogger, folder: Path, items: dict[str, Any]) -> None:
    for key, columns, cells in tables(items):
        lines = [columns, ["---"] * len(columns), *cells]
        logger.experiment.add_text(key, "\n".join(f"| {' | '.join(map(str, x))} |" for x in lines))
    for picture in pictures(folder):
        pixels = np.asarray(Image.open(picture).convert("RGB"))
        logger.experiment.add_image(picture.stem, pixels, dataformats="HWC")


def pictures(folder: Path) -> list[Path]:
    """The pictures in a run folder."""
    return sorted(folder.glob("*.png"))


def tables(items: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[Any]]]]:
    """Name, columns and cells of every list of flat objects."""
    for key, rows in items.items():
        if is_table(rows):
            columns = list(dict.fromkeys(name for row in rows for name in row))
            yield key, columns, [[row.get(name) for name in columns] for row in rows]

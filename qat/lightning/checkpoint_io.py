"""How Lightning's training checkpoints reach the disk."""

from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from qat import disk


class WholeFiles(TorchCheckpointIO):
    """Writes by `qat.disk`.

    Lightning's own moves a file from the folder of temporary files, which may be on another
    filesystem, where a move is a copy that can be cut short.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Replace a checkpoint.

        Raises:
            OSError: If the disk fails; the old file is whole all the same.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with disk.replacing(path) as file:
            torch.save(checkpoint, file)

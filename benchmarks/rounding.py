"""How far the logits of a quantized model move when its images change by rounding.

    python benchmarks/rounding.py runs/w4a4/model.ckpt

The control of a comparison of two implementations: each image is multiplied by 1 + 3e-7 z, where z
is normal noise, and the same simulated model answers both. Takes the first 16 of the 650 photos.
"""

import os
import sys
from pathlib import Path

import torch

import qat
from qat.card import expected_by
from qat.cli.inputs import preparing
from qat.data.sources import labelled_folder

PHOTOS = Path(os.environ.get("LOWBIT_ASSETS", "../shared")) / "data" / "imagenet-val650"


@torch.no_grad()
def main(path: str) -> None:
    """Print gaps and agreement."""
    model = qat.load(path).eval()
    source = labelled_folder(str(PHOTOS / "images"), str(PHOTOS / "labels.tsv"), 1000)
    prepare = preparing(expected_by(model))
    images = torch.stack([torch.from_numpy(prepare(source.image(i))) for i in range(16)])
    torch.manual_seed(0)
    logits, moved = model(images), model(images * (1 + 3e-7 * torch.randn_like(images)))
    gaps = (logits - moved).abs().amax(1)
    agreement = (logits.argmax(1) == moved.argmax(1)).float().mean()
    print(f"gap: median {gaps.median():.2g}, worst {gaps.max():.2g}; same class {agreement:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Where a quantized model loses: its answers with one kind of operand, or one block, in float.

    python benchmarks/operands.py runs/w6a6/model.ckpt

Distance of the answers from those of the float ViT-Ti on the first 100 of the 650 photos: KL
divergence, and logit error, relative. A kind is a layer's name without its block and the operand,
such as `mlp.fc2:input`. What gains most, printed first, is where the loss comes from; where gains
add up to far less than the whole, it comes from everywhere.
"""

import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

import qat
from qat.card import expected_by
from qat.cli.inputs import preparing
from qat.data.sources import labelled_folder
from qat.quantizers import Phase, Quantizer, quantizers
from qat.quantizers.slots import slot_of

ASSETS = Path(os.environ.get("LOWBIT_ASSETS", "../shared"))
PHOTOS = ASSETS / "data" / "imagenet-val650"
NUM_IMAGES, BATCH = 100, 20
FLOAT = ASSETS / "weights" / "vit_tiny_patch16_224.safetensors"


def groups(model: torch.nn.Module) -> dict[str, list[Quantizer]]:
    """Quantizers by kind of operand, and by block."""
    found: dict[str, list[Quantizer]] = defaultdict(list)
    for path, quantizer in quantizers(model):
        slot = slot_of(path, quantizer)
        block = re.match(r"blocks\.\d+", slot.module)
        found[re.sub(r"^blocks\.\d+\.", "", str(slot))].append(quantizer)
        if block:
            found[block.group()].append(quantizer)
    return found


def set_all(quantizers: Iterable[Quantizer], phase: Phase) -> None:
    """Move quantizers to a phase."""
    for quantizer in quantizers:
        quantizer.phase = phase


def answered(model: torch.nn.Module, images: Tensor) -> Tensor:
    """Logits, by batches that stay in the cache."""
    return torch.cat([model(part) for part in images.split(BATCH)])


@torch.no_grad()
def main(path: str) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    model = qat.load(path).eval()
    source = labelled_folder(str(PHOTOS / "images"), str(PHOTOS / "labels.tsv"), 1000)
    prepare = preparing(expected_by(model))
    images = torch.stack([torch.from_numpy(prepare(source.image(i))) for i in range(NUM_IMAGES)])
    exact = answered(qat.timm_model("vit_tiny_patch16_224", weights=str(FLOAT)).eval(), images)

    def distance() -> tuple[float, float]:
        answers = answered(model, images)
        logs = answers.log_softmax(1), exact.log_softmax(1)
        kl = torch.nn.functional.kl_div(*logs, log_target=True, reduction="batchmean")
        return float(kl), float((answers - exact).norm() / exact.norm())

    whole = distance()
    print(f"{'as it is':24} KL {whole[0]:.4f}          logit error {whole[1]:.4f}")
    rows = []
    for name, members in groups(model).items():
        set_all(members, Phase.FLOAT)
        rows.append((distance(), name))
        set_all(members, Phase.QUANTIZE)
    for (kl, error), name in sorted(rows):
        gains = f"KL {kl:.4f} ({kl - whole[0]:+.4f}), logit error {error:.4f}"
        print(f"{name:24} {gains}")


if __name__ == "__main__":
    main(*sys.argv[1:])

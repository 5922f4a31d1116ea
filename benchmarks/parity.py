"""Packed files beside the simulated models they come from, on every evaluation image.

    python benchmarks/parity.py plain react --folder runs/parity

`plain` and `react` are binary ViT-Ti students on CIFAR-10 at 64 pixels, trained here for a few
minutes; what counts is that their weights and thresholds are learned ones. A row holds what
`export --verify` finds, top-1 of the packed model, and how many images have other logits when a
block is one native operation. Models of recipes are compared by `train.py export --verify`.
"""

import argparse
import copy
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from binaryvit import BinaryQuantizers
from binaryvit.asm import DynamicShift, StaticShift
from binaryvit.convert import react_
from qat import Plan, disk, kernels, runtime
from qat.card import expected_by
from qat.cli.inputs import preparing
from qat.data.sources import Source, parquet
from qat.export.pack import export_packed
from qat.export.verify import verify

ASSETS = Path(os.environ.get("LOWBIT_ASSETS", "../shared"))
ROOT = Path(__file__).parents[1]
PLAN = ROOT / "configs" / "plans" / "vit_binary.yaml"
ROWS = ROOT / "docs" / "results" / "parity.jsonl"
BATCH, STEPS, LEARNING_RATE, SIDE = 64, 100, 5e-4, 64

CASES: dict[str, tuple[Callable[..., Any], type]] = {
    "plain": (qat.convert_, StaticShift),
    "react": (react_, DynamicShift),
}
MODELS = {
    "plain": "binary ViT-Ti, `plain`, CIFAR-10",
    "react": "binary ViT-Ti, `react`, dynamic thresholds, CIFAR-10",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--folder", type=Path, default=Path("runs/parity"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for case in arguments.cases:
        path = arguments.folder / f"{case}.ckpt"
        if not path.exists():
            qat.save(student(case), path)
        row = {"model": MODELS[case], **compared(qat.load(path), images("test"))}
        row["command"] = f"python benchmarks/parity.py {case}"
        print(row, flush=True)
        keep(row, ROWS)


def keep(row: dict[str, Any], path: Path) -> None:
    """Write a row into a file of rows, in place of the one of the same model."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = {one["model"]: one for one in map(json.loads, lines)} | {row["model"]: row}
    disk.write(path, "".join(f"{json.dumps(one)}\n" for one in rows.values()))


def images(split: str) -> Source:
    """Images of CIFAR-10."""
    return parquet(str(ASSETS / "data" / "cifar10" / f"{split}.parquet"), "img", "label")


def student(case: str) -> nn.Module:
    """A binary student, briefly distilled from the float model it starts from."""
    torch.manual_seed(0)
    teacher = qat.timm_model(
        "vit_tiny_patch16_224",
        num_classes=10,
        img_size=SIDE,
        data_config={"crop_pct": 1.0},
        weights=str(ASSETS / "weights" / "vit_tiny_cifar10_96px.safetensors"),
    ).eval()
    model = copy.deepcopy(teacher)
    convert, shift = CASES[case]
    train = images("train")
    convert(model, Plan.load(PLAN), BinaryQuantizers(shift=shift))
    order = torch.randperm(len(train))[: BATCH * STEPS].tolist()
    parts = images_of(model, train, order)
    qat.calibrate(model, [next(parts)])
    distil(model.train(), teacher, parts)
    return model.eval()


def distil(model: nn.Module, teacher: nn.Module, batches: Iterator[Tensor]) -> None:
    """Train on the teacher's probabilities."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step, batch in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = teacher(batch).softmax(1)
            logits = model(batch)
        loss = F.cross_entropy(logits.float(), wanted.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            print(f"step {step}, loss {loss.item():.3f}", flush=True)


def images_of(model: nn.Module, source: Source, order: list[int]) -> Iterator[Tensor]:
    """Preprocessed batches."""
    prepare = preparing(expected_by(model))
    for begin in range(0, len(order), BATCH):
        chosen = order[begin : begin + BATCH]
        yield torch.stack([torch.from_numpy(prepare(source.image(i))) for i in chosen])


def compared(model: nn.Module, source: Source) -> dict[str, Any]:
    """What both runs of a model make of all images."""
    with tempfile.TemporaryDirectory() as folder:
        export_packed(model, Path(folder) / "model.lowbit")
        packed = runtime.load(Path(folder) / "model.lowbit")
    order = list(range(len(source)))
    found = verify(model, packed, images_of(model, source, order))
    right, other = 0, 0
    for i, batch in enumerate(images_of(model, source, order)):
        whole, parts = packed(batch.numpy()), packed(batch.numpy(), lambda *_: None)
        right += int((whole.argmax(1) == source.labels[i * BATCH : (i + 1) * BATCH]).sum())
        other += int((whole != parts).any(1).sum())
    return {
        **found.items(),
        "top1": right / len(order),
        "n_other_when_fused": other,
        "instruction_set": kernels.instruction_set(),
        "first_flips": dict(Counter(_place(difference.grid) for difference in found.differences)),
    }


def _place(grid: str | None) -> str:
    """A grid's name without the number of its block."""
    return "none" if grid is None else ".".join(grid.split(".")[2:])


if __name__ == "__main__":
    main()

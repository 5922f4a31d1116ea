"""Answer a stream of digits that drifts, adapt to it under a guard, and survive a crash.

    python examples/guard_stream.py digits.ckpt state/

The model is any checkpoint of `train.py fit --config digits_teacher`, or a quantized one.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import qat
from qat.tta import ABL1, SGD, Adapter, Guard, Tent
from qat.tta.store import Store


def drifting(count: int, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of digits that become darker and noisier; one image is broken on purpose."""
    generator = torch.Generator().manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32), torch.tensor(digits.target)
    for step in range(count):
        rows = torch.randint(len(images), (size,), generator=generator)
        drift = step / count
        noise = torch.randn(size, 1, 8, 8, generator=generator) * drift
        batch = (images[rows][:, None] / 8 - 1) * (1 - drift / 2) - drift / 2 + noise
        if step == 2:
            batch[0, 0, 0, 0] = float("nan")
        yield batch, labels[rows]


def main(file: str, folder: str, count: int = 20) -> None:
    """One line a batch: share of right answers, and what became of the step."""
    model = qat.load(file)
    adapter = Adapter(model, Tent(optimizer=SGD(lr=1e-3), balance=ABL1()), guard=Guard())
    store = Store(folder, {"model": file})
    if Path(folder).exists():  # a stream that was interrupted goes on
        state, counts, problems = store.load()
        adapter.load_state_dict({"state": state, "counts": counts})
        print(f"continued after {adapter.counts.position} batches", *problems)
    for images, labels in drifting(count):
        answer = adapter.adapt(images)
        right = (answer.logits.argmax(1) == labels).float().mean()
        refused = [reason for reason in answer.refusals if reason]
        print(f"right {right:.2f}  {answer.outcome}  {answer.reason}", *refused)
        saved = adapter.state_dict()
        store.save(saved["state"], saved["counts"])


if __name__ == "__main__":
    main(*sys.argv[1:])

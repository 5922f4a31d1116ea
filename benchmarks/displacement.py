"""What moving the adapted parameters costs by itself, whatever the direction.

    python benchmarks/displacement.py W3A3=runs/w3a3/model.ckpt

Tent adapts over the held-out corruptions. Its displacement of the parameters is then laid over the
model as it is, and, as a control, with its values shuffled and their signs drawn at random: as
large, but without direction. Errors on the same images, and the share of answers that differ from
the model left alone. Low bits round small movements up to large changes.
"""

import argparse

import torch
from bench import RECIPE, Bench
from torch import Tensor

from qat.data.streams import StreamBatch
from qat.tta import Adapter


def shuffled(values: Tensor, seed: int) -> Tensor:
    """The values in random order with random signs."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
    return values[torch.randperm(len(values), generator=generator)] * signs


@torch.no_grad()
def answers(adapter: Adapter, batches: list[StreamBatch], displacement: Tensor) -> Tensor:
    """Classes that the model predicts with its parameters displaced."""
    own = adapter.own + displacement
    return torch.cat([adapter.on(own, batch.images).argmax(1) for batch in batches])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("models", nargs="+", help="NAME=model.ckpt of quantize or adapt")
    options.add_argument("--recipe", default=RECIPE)
    options.add_argument("--num_images", type=int, default=500)
    options.add_argument("--batch_size", type=int, default=50)
    options.add_argument("--seed", type=int, default=2)
    options.add_argument("--controls", type=int, default=3)
    given = options.parse_args()
    torch.set_num_threads(1)
    sizes = {"num_images": given.num_images, "batch_size": given.batch_size}
    for item in given.models:
        name, _, path = item.partition("=")
        bench = Bench(path, given.recipe, ["heldout"], given.seed, **sizes)
        batches = bench.batches
        labels = torch.cat([batch.labels for batch in batches])
        adapter = bench.adapter("tent")
        for batch in batches:
            adapter.adapt(batch.images)
        moved = adapter.state["method.params"] - adapter.own

        source = answers(adapter, batches, torch.zeros_like(moved))
        relative = float(moved.norm() / adapter.own.norm())
        print(f"{name} left alone: error {float((source != labels).float().mean()):.4f}")
        rows = {f"Tent's displacement, {relative:.1e} of the norm": moved}
        rows |= {f"control {seed}": shuffled(moved, seed) for seed in range(given.controls)}
        for row, displacement in rows.items():
            found = answers(adapter, batches, displacement)
            error, changed = ((found != other).float().mean() for other in (labels, source))
            print(f"{name} {row}: error {error:.4f}, answers changed {changed:.4f}", flush=True)


if __name__ == "__main__":
    main()

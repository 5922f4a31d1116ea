"""What moving the adapted parameters costs by itself, whatever the direction.

    python benchmarks/displacement.py W3A3=runs/w3a3/model.ckpt

Tent adapts over the held-out corruptions. Its displacement of the parameters is then laid over the
model as it is, and, as a control, with its values shuffled and their signs drawn at random: as
large, but without direction. Errors on the same images, and the share of answers that differ from
the model left alone. Low bits round small movements up to large changes.
"""

import argparse
from dataclasses import replace

import torch
from torch import Tensor

import qat
from qat.data.streams import StreamBatch
from qat.lightning.cli import make_parser
from qat.lightning.commands.adapt import StreamSettings, make_stream
from qat.lightning.commands.common import arguments_of, make_data
from qat.models import num_classes_of
from qat.preprocessing import expected_by
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
    options.add_argument("--recipe", default="configs/tta/cifar10_vit_tiny.yaml")
    options.add_argument("--num_images", type=int, default=500)
    options.add_argument("--batch_size", type=int, default=50)
    options.add_argument("--seed", type=int, default=2)
    options.add_argument("--controls", type=int, default=3)
    given = options.parse_args()
    torch.set_num_threads(1)
    parser = make_parser()[1]["adapt"]
    words = ["--config", given.recipe]
    for part in ("heldout", "tent"):
        words += ["--config", f"configs/tta/parts/{part}.yaml"]
    config = parser.parse_args([*words, "--seed_everything", str(given.seed)])
    for item in given.models:
        name, _, path = item.partition("=")
        model = qat.load(path)
        data = make_data(parser, config)
        data.attach(expected_by(model), num_classes_of(model))
        settings = StreamSettings(**arguments_of(parser, config, "stream"))
        settings = replace(settings, num_images=given.num_images, batch_size=given.batch_size)
        batches = list(make_stream(settings, data, model, given.seed).batches())
        labels = torch.cat([batch.labels for batch in batches])
        adapter = Adapter(model, parser.instantiate(config).method)
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

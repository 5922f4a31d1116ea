"""Measures the seconds of every product of a recipe's model on this machine, for `train.py search`.

    python benchmarks/latency_table.py --config configs/pmq/imagenet_vit_tiny.yaml --out latency.csv

What runs is what torch has for a processor: an int8 product for widths up to eight, a float one
where an operand stays in float. Widths below eight so cost what eight cost; a table of kernels that
gain from them has the same form. Products are those of one image, biases and norms left out.
"""

import argparse
import csv
import time
from itertools import product
from statistics import median

import torch
from torch import Tensor, nn

from qat.cli.main import open_session
from qat.cost.count import Site, cost
from qat.cost.latency import COLUMNS


def shape(
    model: nn.Module, site: Site, num_tokens: int, num_heads: int
) -> tuple[int, int, int, int]:
    """How many products of which rows, inner size and columns a site computes."""
    if site.num_weights:
        columns = len(model.get_submodule(site.name).weight)  # type: ignore[arg-type]
        return 1, site.macs // site.num_weights, site.num_weights // columns, columns
    inner = site.macs // (num_tokens**2 * num_heads)
    if site.name.endswith(".qk"):
        return num_heads, num_tokens, inner, num_tokens
    return num_heads, num_tokens, num_tokens, inner


def seconds(count: int, left: Tensor, right: Tensor, rounds: int) -> float:
    """Median time of a product, `count` times."""
    multiply = torch.matmul if left.is_floating_point() else torch._int_mm  # type: ignore[attr-defined]
    found = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for _ in range(count):
            multiply(left, right)
        found.append(time.perf_counter() - begun)
    return median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--num_threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    session = open_session("search", "--config", arguments.config)
    model = session.changed({"model.plan": None}).model()
    num_tokens = int(model.pos_embed.shape[1])  # type: ignore[union-attr]
    num_heads = int(model.blocks[0].attn.num_heads)  # type: ignore[index,union-attr]
    measured: dict[tuple[int, ...], tuple[float, float]] = {}
    with open(arguments.out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for site in cost(model).sites:
            count, rows, inner, columns = shape(model, site, num_tokens, num_heads)
            key = count, rows, inner, columns
            if key not in measured:
                # The int8 product wants more than 16 rows and sizes in eights; padding is the cost.
                sizes = [max(24, -(-size // 8) * 8) for size in (rows, inner, columns)]
                low = torch.ones(*sizes[:2], dtype=torch.int8), torch.ones(*sizes[1:]).char()
                high = torch.ones(rows, inner), torch.ones(inner, columns)
                measured[key] = (
                    seconds(count, *low, arguments.rounds),
                    seconds(count, *high, arguments.rounds),
                )
            low_seconds, high_seconds = measured[key]
            for left, right in product([*range(2, 9), 32], repeat=2):
                time_ = low_seconds if max(left, right) <= 8 else high_seconds
                writer.writerow([site.name, left, right, f"{time_:.3e}"])


if __name__ == "__main__":
    main()

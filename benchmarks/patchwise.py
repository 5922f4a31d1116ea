"""Patch-wise bits: P1 against random, inverse and uniform bits at equal mean bits.

    python benchmarks/patchwise.py --config configs/pmq/imagenet_vit_tiny.yaml --first_block 0 6 9

One calibrated model for each uniform width; each ranking then runs on it.
"""

import argparse

import torch
from allocation import Bench

from qat.patchwise import ClassAttention, Inverse, PatchBits, RandomOrder, patchwise
from qat.plan import Plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bits", type=int, nargs="+", default=[6])
    parser.add_argument("--first_block", type=int, nargs="+", default=[0, 6])
    parser.add_argument("--spread", type=int, nargs="+", default=[1])
    parser.add_argument("--limit", type=int, default=10**6, help="evaluation batches")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(arguments.config, arguments.seed, arguments.limit)
    for bits in arguments.bits:
        model = bench.quantized(Plan.uniform(bits, bits))
        print(f"w{bits}a{bits} uniform", bench.row(model), flush=True)
        for first in arguments.first_block:
            for spread in arguments.spread:
                for ranking in (ClassAttention(), RandomOrder(), Inverse()):
                    settings = PatchBits(spread, spread, 0.5, ranking, first)
                    with patchwise(model, settings):
                        row = bench.row(model)
                    name = type(ranking).__name__
                    print(f"w{bits}a{bits} +-{spread} from block {first} {name}", row, flush=True)


if __name__ == "__main__":
    main()

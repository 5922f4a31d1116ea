"""A million images through one adapter, by tenths: memory, files, threads, delay, error (goal R11).

    python train.py fit --config configs/qat/digits_w4a4_lsq.yaml --run_dir runs/digits
    python benchmarks/endurance.py runs/digits/checkpoints/best.ckpt --images 1000000

The stream of the recipe goes round and round, as one that recurs. Delays are of one call, on a
machine that ought to do nothing else.
"""

import argparse
import gc
import os
import threading
import time
from itertools import cycle
from pathlib import Path
from statistics import mean, quantiles

import torch
from bench import Bench


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="checkpoint of a model on the recipe's data")
    parser.add_argument("--recipe", default="configs/tta/digits.yaml")
    parser.add_argument("--part", default="ttaq_tent+guarded", help="joined by +, such as a+b")
    parser.add_argument("--images", type=int, default=1_000_000)
    return parser.parse_args()


def resident() -> float:
    """Memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    given = options()
    torch.set_num_threads(1)
    bench = Bench(given.model, given.recipe)
    adapter = bench.adapter(given.part)
    source = mean(
        float((adapter.source(batch.images).argmax(1) != batch.labels).float().mean())
        for batch in bench.batches
    )
    print(f"left alone: error {source:.4f}")
    stream = cycle(bench.batches)
    for tenth in range(1, 11):
        delays, errors = [], []
        while adapter.counts.images < tenth * given.images / 10:
            batch = next(stream)
            started = time.perf_counter()
            answer = adapter.adapt(batch.images)
            delays.append(time.perf_counter() - started)
            errors.append(float((answer.logits.argmax(1) != batch.labels).float().mean()))
        gc.collect()
        cuts = quantiles(delays, n=100)
        files = len(os.listdir("/proc/self/fd"))
        print(
            f"{adapter.counts.images:8d} images: {resident():.1f} MiB, {files} files, "
            f"{threading.active_count()} threads, p50 {1e3 * cuts[49]:.2f} ms, "
            f"p99 {1e3 * cuts[98]:.2f} ms, error {mean(errors):.4f}, "
            f"resets {adapter.counts.reset}",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Methods of adaptation side by side over one stream: errors, and cost relative to inference.

    python benchmarks/adapt.py W4A4=runs/w4a4/model.ckpt --parts tent ttaq_tent \
        --num_images 100 --seeds 0 1 2 --out runs/tta.jsonl

The model left alone answers the stream once; every method is compared with that. A seed draws the
images, their order, and what corruptions and methods draw. Costs are in processor time of one
thread, the forward pass that only the comparison needs not counted. A guarded method after the
same without a guard is not run again unless the guard finds a collapse: the answers are those of
the first run, judged, and no cost is given. `--out` gets a line of JSON for each model, seed and
method, which `benchmarks/adapt_report.py` lays out.
"""

import argparse
import json
import time
from contextlib import nullcontext

import torch
from bench import RECIPE, Bench, guarded
from torch import Tensor

from qat.footprint import Footprint
from qat.lightning.adaptation import memory_items
from qat.lightning.stream_scores import Scores
from qat.models import num_classes_of
from qat.tta import Adapter, Source
from qat.tta.adapter import Counts

LINE = (
    "{model:6s} {seed} {part:18s} source {error_source_mean:.4f} error {error_mean:.4f} "
    "class {error_class_mean:.4f} worst {error_worst:.3f} "
    "loss {loss_worst:+.3f} ({loss_worst_corruption}) ece {ece_source_mean:.3f} -> {ece_mean:.3f} "
    "time x{seconds_ratio} of {images_per_second:.0f}/s memory x{memory_ratio:.2f} "
    "backward {n_backward} resets {n_reset} rolled back {n_rolled_back}"
)


WEIGHED = 3
"""Batches in which memory is counted."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="NAME=model.ckpt of quantize or adapt")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--parts", nargs="+", default=["tent"], help="joined by +, such as a+b")
    parser.add_argument("--stream", nargs="*", default=[], help="parts that change the stream")
    parser.add_argument("--num_images", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", help="file that lines of JSON are added to")
    return parser.parse_args()


def answered(adapter: Adapter, bench: Bench, end: int | None = None) -> tuple[list[Tensor], int]:
    """Logits of every batch before `end`, and the most bytes that the first ones needed."""
    answers, footprint = [], Footprint()
    for batch in bench.batches[:end]:
        if batch.position in bench.stream.restarts:
            adapter.reset()
        with footprint if batch.position < WEIGHED else nullcontext():
            answers.append(adapter.adapt(batch.images).logits)
    return answers, footprint.peak


def compare(name: str, path: str, given: argparse.Namespace, seed: int) -> None:
    """Every method over the stream of one seed."""
    sizes = {"num_images": given.num_images, "batch_size": given.batch_size}
    bench = Bench(path, given.recipe, given.stream, seed, **sizes)
    batches, num_classes = bench.batches, num_classes_of(bench.model)
    source = Adapter(bench.model, Source())
    source.adapt(batches[0].images)  # not timed: first calls are slow
    started = time.process_time()
    reference, peak_source = answered(source, bench)
    seconds = time.process_time() - started
    runs: dict[str, tuple[list[Tensor], Counts]] = {}
    for part in given.parts:
        adapter = bench.adapter(part)
        ratio = None
        answers, counts = runs.get(part.removesuffix("+guarded"), ([], Counts()))
        if answers and adapter.guard is not None:
            answers, num_collapses = guarded(
                adapter.guard, reference, answers, bench.stream.restarts
            )
            answers = [] if num_collapses else answers
        if answers:
            peak = answered(adapter, bench, WEIGHED)[1]
        else:
            started = time.process_time()
            answers, peak = answered(adapter, bench)
            ratio = round((time.process_time() - started) / seconds, 3)
            counts = adapter.counts
        runs[part] = (answers, counts)
        scores = Scores(bench.stream.domains, num_classes)
        for batch, logits, exact in zip(batches, answers, reference, strict=True):
            scores.add(logits, exact, batch.labels, batch.domains)
        row = {
            "model": name,
            "stream": "+".join(given.stream) or "continual",
            "seed": seed,
            "part": part,
            **sizes,
            **scores.summary(),
            "seconds_ratio": ratio,
            "images_per_second": counts.images / seconds,
            "n_backward": counts.backward,
            **memory_items(adapter, peak, peak_source),
            "n_reset": counts.reset,
            "n_rolled_back": counts.rolled_back,
        }
        print(LINE.format(**row), flush=True)
        if given.out:
            with open(given.out, "a") as file:
                file.write(json.dumps(row) + "\n")


def main() -> None:
    given = options()
    torch.set_num_threads(1)
    for model in given.models:
        name, _, path = model.partition("=")
        for seed in given.seeds:
            compare(name, path, given, seed)


if __name__ == "__main__":
    main()

"""Methods of adaptation side by side over one stream: errors, and cost relative to inference.

    python benchmarks/adapt.py W4A4=runs/w4a4/model.ckpt --parts tent ttaq_tent \
        --num_images 100 --seeds 0 1 2 --out runs/tta.jsonl

Every method, and the model left alone, answers a batch before the next is made, so that a stream of
any length fits in memory. A seed draws the images, their order, and what corruptions and methods
draw. Costs are in processor time of one thread, the forward pass that only the comparison needs not
counted. A guarded method after the same without a guard takes the answers of that, judged, and has
no cost, until its guard finds a collapse. `--out` gets a line of JSON for each model, seed and
method when the stream has ended; `benchmarks/adapt_report.py` lays them out.
"""

import argparse
import json
import time
from contextlib import nullcontext
from dataclasses import asdict

import torch
from bench import RECIPE, Bench
from torch import Tensor

from qat.cli.adaptation import memory_items
from qat.cli.stream_scores import Scores
from qat.cost.footprint import Footprint
from qat.data.streams import StreamBatch
from qat.models import num_classes_of
from qat.tta import Adapter, Source
from qat.tta.parts import part, with_part

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
    parser.add_argument("--stream", nargs="*", default=[], help="choices that change the stream")
    parser.add_argument("--num_images", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", help="file that lines of JSON are added to")
    return parser.parse_args()


class Entrant:
    """One method before the stream.

    Args:
        adapter: The method at work.
        bare: The same method without a guard; its answers serve until the guard finds a collapse.
    """

    def __init__(self, adapter: Adapter, bare: "Entrant | None" = None) -> None:
        self.adapter, self.bare = adapter, bare
        self.logits = torch.empty(0)
        self.seconds, self.peak, self.runs = 0.0, 0, bare is None

    def answer(self, batch: StreamBatch, source: Tensor) -> None:
        """Answer a batch; `source` is the answer of the model left alone."""
        weigh, footprint = batch.position < WEIGHED, Footprint()
        if self.runs or weigh:
            started = time.process_time()
            with footprint if weigh else nullcontext():
                self.logits = self.adapter.adapt(batch.images).logits
            self.seconds += time.process_time() - started
            self.peak = max(self.peak, footprint.peak)
            self.runs |= self.adapter.counts.reset > 0
        else:
            self.follow(source)

    def follow(self, source: Tensor) -> None:
        """Take the answers and the state of the method without a guard; a collapse ends that."""
        adapter, bare = self.adapter, self.bare
        assert bare is not None and adapter.guard is not None
        verdict = adapter.guard.judge(part(adapter.state, "guard"), source, bare.logits)
        self.logits, self.runs = verdict.logits, bool(verdict.collapse)
        counts = asdict(bare.adapter.counts)
        counts["reset"] += self.runs
        state = adapter.initial if self.runs else bare.adapter.state
        state = with_part(state, "guard", verdict.state)
        adapter.load_state_dict({"state": state, "counts": counts})


def entrants(bench: Bench, parts: list[str]) -> dict[str, Entrant]:
    """The methods, by the names of their parts."""
    found: dict[str, Entrant] = {}
    for name in parts:
        bare = name.removesuffix("+guarded")
        found[name] = Entrant(bench.adapter(name), found.get(bare) if bare != name else None)
    return found


def compare(name: str, path: str, given: argparse.Namespace, seed: int) -> None:
    """Every method over the stream of one seed."""
    sizes = {"num_images": given.num_images, "batch_size": given.batch_size}
    bench = Bench(path, given.recipe, given.stream, seed, **sizes)
    alone, methods = Entrant(Adapter(bench.model, Source())), entrants(bench, given.parts)
    scores = {words: Scores(bench.stream.domains, num_classes_of(bench.model)) for words in methods}
    alone.adapter.source(bench.stream[0].images)  # not timed: first calls are slow
    for batch in bench.stream.batches():
        alone.answer(batch, alone.logits)
        for words, entrant in methods.items():
            if batch.position in bench.stream.restarts:
                entrant.adapter.reset()
            entrant.answer(batch, alone.logits)
            scores[words].add(entrant.logits, alone.logits, batch.labels, batch.domains)
    for words, entrant in methods.items():
        counts = entrant.adapter.counts
        ratio = round(entrant.seconds / alone.seconds, 3) if entrant.bare is None else None
        row = {
            "model": name,
            "stream": "+".join(given.stream) or "continual",
            "seed": seed,
            "part": words,
            **sizes,
            **scores[words].summary(),
            "seconds_ratio": ratio,
            "images_per_second": counts.images / alone.seconds,
            "n_backward": counts.backward,
            **memory_items(entrant.adapter, entrant.peak, alone.peak),
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

"""How far a guard may hear the adapted model: guards replayed over the answers of one run.

    python benchmarks/guard_weights.py W4A4=runs/w4a4/model.ckpt --part ttaq_tent --seeds 7 8

A method adapts over the held-out corruptions, once for each seed. Guards of several weights and
probations then judge the same pairs of answers, with nothing behind them or, `--healthy 150000`,
as at the end of a long stream. `loss` is the largest rise of the error on a corruption, seeds taken
together. A guard that finds a collapse would have started the method anew, which a replay cannot
show: `collapses` above 0 makes its line worthless.
"""

import argparse
from itertools import product

import torch
from bench import RECIPE, Bench
from torch import Tensor

from qat.tta import Guard

WEIGHTS = [0.25, 0.5, 1.0]
PROBATIONS = [2_500, 5_000, 10_000, 20_000, 40_000]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="NAME=model.ckpt of quantize or adapt")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--part", default="ttaq_tent", help="method; joined by +, such as a+b")
    parser.add_argument("--stream", default="heldout", help="part that changes the stream")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8])
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS)
    parser.add_argument("--probations", type=int, nargs="+", default=PROBATIONS)
    parser.add_argument("--healthy", type=float, default=0.0, help="healthy images seen before")
    return parser.parse_args()


def guarded(
    guard: Guard, healthy: float, source: list[Tensor], adapted: list[Tensor]
) -> tuple[list[Tensor], int]:
    """What a guard makes of the answers of a run without one, and how many collapses it finds."""
    answers, num_collapses = [], 0
    state = {**guard.start(source[0].shape[1]), "healthy": torch.tensor(healthy)}
    for first, second in zip(source, adapted, strict=True):
        verdict = guard.judge(state, first, second)
        state = verdict.state
        num_collapses += bool(verdict.collapse)
        answers.append(verdict.logits)
    return answers, num_collapses


def report(row: str, answers: Tensor, source: Tensor, labels: Tensor, domains: list[str]) -> None:
    """A line: error, largest rise of it on a corruption, share of answers that changed."""
    lost = (answers != labels).float() - (source != labels).float()
    rises = {
        domain: float(lost[torch.tensor([d == domain for d in domains])].mean())
        for domain in dict.fromkeys(domains)
    }
    worst = max(rises, key=lambda domain: rises[domain])
    error, changed = ((answers != other).float().mean() for other in (labels, source))
    print(
        f"{row}: error {error:.4f}, loss {rises[worst]:+.4f} ({worst}), changed {changed:.4f}",
        flush=True,
    )


def main() -> None:
    given = options()
    torch.set_num_threads(1)
    sizes = {"num_images": given.num_images, "batch_size": given.batch_size}
    for item in given.models:
        name, _, path = item.partition("=")
        runs: list[tuple[list[Tensor], list[Tensor]]] = []
        truths, domains = [], []
        for seed in given.seeds:
            bench = Bench(path, given.recipe, [given.stream], seed, **sizes)
            adapter = bench.adapter(given.part)
            runs.append(([], []))
            for batch in bench.stream.batches():
                runs[-1][0].append(adapter.source(batch.images))
                runs[-1][1].append(adapter.adapt(batch.images).logits)
                truths.append(batch.labels.clone())  # so that the batch itself is let go
                domains += batch.domains
        source, bare = (torch.cat([x.argmax(1) for run in runs for x in run[i]]) for i in (0, 1))
        report(f"{name} left alone", source, source, torch.cat(truths), domains)
        report(f"{name} method", bare, source, torch.cat(truths), domains)
        for weight, probation in product(given.weights, given.probations):
            guard = Guard(weight=weight, probation=probation)
            found = [guarded(guard, given.healthy, *run) for run in runs]
            answers = torch.cat([logits.argmax(1) for run, _ in found for logits in run])
            count = sum(count for _, count in found)
            row = f"{name} weight {weight:g}, probation {probation}, collapses {count}"
            report(row, answers, source, torch.cat(truths), domains)


if __name__ == "__main__":
    main()

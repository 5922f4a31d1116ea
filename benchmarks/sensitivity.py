"""Rank correlation of each sensitivity metric with the ground truth M6, its seconds, its stability.

    python benchmarks/sensitivity.py --config configs/pmq/imagenet_vit_tiny.yaml --out runs/metrics

The model is initialised once, as `search` does. M6 is measured on 32 images that no metric sees;
every metric on `--draws` draws of 32 others, at 2 to 8 bits. Seconds are processor time of one
thread. Stability is the mean Spearman correlation between the tables of two draws. A later run with
the same `--out` reuses M6 and the finished metrics.
"""

import argparse
import json
import time
from itertools import combinations, product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn

from qat.cli.main import open_session
from qat.quantizers import PercentileMSE, quantizers
from qat.quantizers.slots import Slot, slot_of
from qat.search.metrics import (
    DiagonalFisher,
    FirstOrder,
    HessianTrace,
    OutputDivergence,
    Removal,
    TaylorRemoval,
    TokenFisher,
)
from qat.search.metrics.hessian import squared_errors
from qat.search.probe import probing
from qat.search.sensitivity import Metric, Table, mean_table
from qat.spec import Operand

METRICS: dict[str, Metric] = {
    "M1": TaylorRemoval(),
    "M3": FirstOrder(),
    "M4": DiagonalFisher(),
    "Mtoken": TokenFisher(),
}
ONCE: dict[str, Metric] = {
    "M1 predicted": TaylorRemoval(target="predicted"),
    "M3 predicted": FirstOrder(target="predicted"),
    "M4 predicted": DiagonalFisher(target="predicted"),
    "M2": Removal(),
}
"""Measured on the first draw only."""
GROUPS = {"weights": True, "activations": False, "all": None}
COUNTS = (1, 5, 10, 20, 50)
"""Numbers of random vectors at which the Hessian's trace is looked at."""


def observer(spec: Any, shape: Any) -> PercentileMSE:
    return PercentileMSE(spec, shape, per_token=True)


def pack(table: Table) -> dict[str, dict[str, float]]:
    return {str(slot): {str(b): v for b, v in row.items()} for slot, row in table.items()}


def unpack(items: dict[str, dict[str, float]]) -> Table:
    found = {}
    for name, row in items.items():
        module, _, operand = name.rpartition(":")
        found[Slot(module, Operand(operand))] = {int(b): v for b, v in row.items()}
    return found


def prepare(config: str, draws: int, draw: int) -> tuple[nn.Module, Tensor, list[Tensor]]:
    """The initialised model, the images of M6, and those of each draw."""
    words = ("--data.num_calibration", str(32 * (draws + 2)), "--seed_everything", str(draw))
    session = open_session("quantize", "--config", config, *words)
    module, data = session.module(), session.data()
    data.follow(module.model)
    judged, initial, *others = torch.cat(data.calibration_batches()).split(32)
    module.initialise(module.model, [initial], module.journal)
    return module.model, judged, others


def cached(path: Path, compute: Any) -> dict[str, Any]:
    if not path.exists():
        begun = time.process_time()
        table = compute()
        items = {"seconds": time.process_time() - begun, "table": table}
        path.write_text(json.dumps(items))
    return json.loads(path.read_text())


def correlation(table: Table, truth: Table, bits: int, weights: bool | None) -> tuple[float, float]:
    slots = [s for s in truth if weights is None or weights == (s.operand is Operand.WEIGHT)]
    pair = [table[s][bits] for s in slots], [truth[s][bits] for s in slots]
    found: list[Any] = [test(*pair) for test in (kendalltau, spearmanr)]
    return float(found[0].statistic), float(found[1].statistic)


def trace(model: nn.Module, probes: Any, images: Tensor, count: int) -> dict[str, Any]:
    """Tables of the Hessian metric at several numbers of random vectors, from one run."""
    metric = HessianTrace(num_samples=count)
    errors, sizes = squared_errors(model, probes, images, metric.images_at_once)
    total, tables = [0.0] * len(probes), {}
    for done, new in enumerate(metric.estimates(model, probes, images), 1):
        total = [a + b for a, b in zip(total, new, strict=True)]
        if done in COUNTS:
            tables[str(done)] = pack(
                {
                    slot: {
                        b: max(0.0, t / done) / sizes[slot] * e
                        for b, e in zip(probe.widths, errors[slot].tolist(), strict=True)
                    }
                    for (slot, probe), t in zip(probes.items(), total, strict=True)
                }
            )
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--truth_bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--brief", action="store_true", help="leave M2 and other targets out")
    parser.add_argument("--m5_draws", type=int, default=1)
    parser.add_argument("--m5_samples", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    model, judged, draws = prepare(arguments.config, arguments.draws, arguments.seed)
    slots = [slot_of(path, q) for path, q in quantizers(model)]
    tables: dict[str, list[Table]] = {}
    seconds: dict[str, float] = {}
    path = arguments.out / "m6.json"
    with probing(
        model, draws[0][:8], dict.fromkeys(slots, tuple(arguments.truth_bits)), observer
    ) as p:
        truth = unpack(cached(path, lambda: pack(OutputDivergence()(model, p, judged)))["table"])
    print(f"M6: {json.loads(path.read_text())['seconds']:.0f} s for {arguments.truth_bits}")
    for index, images in enumerate(draws):
        more = {} if index or arguments.brief else ONCE
        with probing(model, images[:8], dict.fromkeys(slots, tuple(range(2, 9))), observer) as p:
            for name, metric in (METRICS | more).items():
                path = arguments.out / f"{name.replace(' ', '_')}_{index}.json"
                found = cached(path, lambda m=metric, p=p, x=images: pack(m(model, p, x)))
                tables.setdefault(name, []).append(unpack(found["table"]))
                seconds[name] = found["seconds"]
            if index < arguments.m5_draws:
                path = arguments.out / f"M5_{index}.json"
                count = arguments.m5_samples
                found = cached(path, lambda n=count, p=p, x=images: trace(model, p, x, n))
                for done, items in found["table"].items():
                    tables.setdefault(f"M5 {done}", []).append(unpack(items))
                    seconds[f"M5 {done}"] = found["seconds"] * int(done) / count
        report(tables, seconds, truth)


def report(tables: dict[str, list[Table]], seconds: dict[str, float], truth: Table) -> None:
    widths = list(next(iter(truth.values())))
    print("\nmetric, draws: group@bits kendall/spearman; seconds; stability")
    for name, found in tables.items():
        cells = []
        for bits, (group, weights) in product(widths, GROUPS.items()):
            scores = [correlation(table, truth, bits, weights) for table in found]
            cells.append(
                f"{group}@{bits} {mean(k for k, _ in scores):.3f}/{mean(s for _, s in scores):.3f}"
            )
        pairs = [correlation(a, b, 4, None)[1] for a, b in combinations(found, 2)]
        stable = f"{mean(pairs):.3f}" if pairs else "-"
        print(f"{name:14} {len(found)}: {'  '.join(cells)}; {seconds[name]:.1f} s; {stable}")
        if len(found) > 1:
            k, s = correlation(mean_table(found), truth, widths[0], None)
            print(f"{'':14} mean table all@{widths[0]} {k:.3f}/{s:.3f}")


if __name__ == "__main__":
    main()

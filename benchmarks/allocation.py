"""Accuracy at equal BOPs: uniform, random, greedy and frontier allocations, by several metrics.

    python benchmarks/sensitivity.py --config C --out runs/metrics --seed 1
    python benchmarks/allocation.py --config C --tables runs/metrics --seed 1 --out runs/a.csv

Tables of sensitivities are those of the first draw of `benchmarks/sensitivity.py` with the same
seed. Every plan is initialised anew on 32 images and evaluated on images that neither the tables
nor the calibration have seen. Budgets are the BOPs of uniform plans. Rows that are in `--out`
already are not run again.
"""

import argparse
import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sensitivity import unpack
from torch import Tensor, nn

from qat import convert_
from qat.cli.main import open_session
from qat.cost.count import cost
from qat.plan import Plan
from qat.quantizers import QuantizerFactory
from qat.search import pmq
from qat.search.allocate import best
from qat.search.baselines import at_random, greedy
from qat.search.sensitivity import monotone
from qat.spec import Operand

CHOICES = {
    "random 0": ("M4", at_random, 0),
    "random 1": ("M4", at_random, 1),
    "greedy M4": ("M4", greedy, 0),
    "M1 + DP": ("M1", best, 0),
    "M4 + DP": ("M4", best, 0),
    "M5 + DP": ("M5", best, 0),
    "Mtoken + DP": ("Mtoken", best, 0),
}


class Bench:
    """A recipe's model, its calibration images, and images to evaluate."""

    def __init__(self, config: str, seed: int, limit: int) -> None:
        words = ("--config", config, "--data.num_calibration", "96", "--seed_everything", str(seed))
        session = open_session("quantize", *words)
        self.session = session.changed({"model.plan": None})
        self.make: QuantizerFactory = session.model().card.conversion.make_quantizer
        module, data = self.session.module(), self.session.data()
        data.follow(module.model)
        self.initialise, self.journal = module.initialise, module.journal
        # The first 32 judge metrics, the last 32 are the first draw, see benchmarks/sensitivity.py.
        self.images = torch.cat(data.calibration_batches())[32:64]
        found = [(x, y) for (x, y, _), _ in zip(data.val_dataloader(), range(limit), strict=False)]
        self.batches, self.labels = [x for x, _ in found], torch.cat([y for _, y in found])
        self.exact = self.logits(module.model.eval())

    def model(self, plan: Plan) -> nn.Module:
        """The float model, converted."""
        model = self.session.model()
        convert_(model, plan, self.make)
        return model

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        """Of the images that are evaluated."""
        return torch.cat([model(batch) for batch in self.batches])

    def quantized(self, plan: Plan) -> nn.Module:
        """The model under a plan, initialised as the recipe says."""
        model = self.model(plan)
        self.initialise(model, [self.images], self.journal)
        return model.eval()

    def row(self, model: nn.Module) -> dict[str, Any]:
        """What a quantized model is worth, and costs."""
        logits = self.logits(model)
        error = (logits - self.exact).norm() / self.exact.norm()
        log_p, log_q = self.exact.log_softmax(-1), logits.log_softmax(-1)
        return {
            "top1": (logits.argmax(1) == self.labels).float().mean().item(),
            "agreement": (logits.argmax(1) == self.exact.argmax(1)).float().mean().item(),
            "logit_error": error.item(),
            "kl": (log_p.exp() * (log_p - log_q)).sum(1).mean().item(),
            "bops": cost(model).bops,
            "n_images": len(logits),
        }


def read_table(folder: Path, name: str) -> Any:
    items = json.loads((folder / f"{name}_0.json").read_text())["table"]
    return monotone(unpack(items[max(items, key=int)] if name == "M5" else items))


def searched(
    bench: Bench, table: Any, budget: float, allocate: Any, seed: int, narrowest: int
) -> Plan:
    """The plan of an allocation; activations have at least `narrowest` bits."""
    table = {
        slot: {b: v for b, v in row.items() if b >= narrowest or slot.operand is Operand.WEIGHT}
        for slot, row in table.items()
    }
    template = bench.model(Plan.uniform(8, 8))
    costs, space = cost(template), pmq.Space()
    task = pmq.problem(costs, table, space, "bops", pmq.cost_of("bops", None))
    picks = allocate(task.components, budget - task.constant, seed)
    return pmq.plan_of(template, pmq.chosen_bits(task.components, picks, table), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 5, 6])
    parser.add_argument("--limit", type=int, default=10**6, help="evaluation batches")
    parser.add_argument("--narrowest", type=int, default=2, help="bits of activations")
    parser.add_argument("--choices", nargs="+", default=list(CHOICES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(arguments.config, arguments.seed, arguments.limit)
    done = set()
    if arguments.out.exists():
        with open(arguments.out, newline="") as file:
            done = {(row["budget"], row["choice"]) for row in csv.DictReader(file)}
    top1 = (bench.exact.argmax(1) == bench.labels).float().mean()
    print(f"float top-1 {top1:.4f} of {len(bench.labels)}")
    for bits in arguments.bits:
        budget = cost(bench.model(Plan.uniform(bits, bits))).bops
        plans: dict[str, Any] = {"uniform": partial(Plan.uniform, bits, bits)}
        for name in arguments.choices:
            metric, allocate, seed = CHOICES[name]
            plans[name] = partial(
                lambda m, *rest: searched(bench, read_table(arguments.tables, m), *rest),
                metric, budget, allocate, seed, arguments.narrowest,
            )  # fmt: skip
        for name, plan in plans.items():
            if name != "uniform" and arguments.narrowest > 2:
                name = f"{name}, activations >= {arguments.narrowest}"
            if (f"w{bits}a{bits}", name) in done:
                continue
            row = {"budget": f"w{bits}a{bits}", "choice": name}
            row |= bench.row(bench.quantized(plan()))
            print(row, flush=True)
            with open(arguments.out, "a", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                if not file.tell():
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()

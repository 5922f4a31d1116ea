"""Cost of a training step: converted W4A4 LSQ and binary against the float step of the same model.

    python benchmarks/train_step.py --model deit_tiny_patch16_224 --batch 16 --rounds 7

One thread, processor time of the process, variants interleaved round by round, so that other load
on the machine hardly matters. A ratio is the median over rounds of (variant / baseline in the same
round), with the smallest and largest beside it. A step is forward, cross-entropy and backward,
without the optimizer. There are two baselines, since on AMD processors torch's default float32
matrix product runs far below what the same processor does through oneDNN: `float` is torch's
default, `float medium` is under `set_float32_matmul_precision("medium")`, which is true float32 on
processors without AMX. The low-bit variants are timed under both.

With `--compiled` each variant is timed compiled under bfloat16 autocast as well, which is what
`fit` does with `trainer.compile: true` and `trainer.precision: bf16-mixed`. `--depth` shortens the
model.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import qat
from binaryvit import BinaryQuantizers
from binaryvit.asm import DynamicShift
from binaryvit.convert import react_
from qat.plan import Plan
from qat.quantizers import LSQ

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    images = torch.randn(arguments.batch, 3, 224, 224)
    models = variants(arguments.model, arguments.depth, images)
    steps = {name: step(model, images) for name, model in models}
    if arguments.compiled:
        steps |= {
            f"{name}, compiled, bf16": step(model, images, compiled=True)
            for name, model in variants(arguments.model, arguments.depth, images)
        }
    times: dict[tuple[str, str], list[float]] = {}
    for round_ in range(arguments.rounds + 1):
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            for name, run in steps.items():
                start = time.process_time()
                run()
                seconds = time.process_time() - start
                if round_:  # the first round warms up
                    times.setdefault((name, precision), []).append(seconds)
    report(times, arguments)


def variants(name: str, depth: int, images: torch.Tensor) -> list[tuple[str, nn.Module]]:
    """The float model and its converted copies, calibrated."""
    plans = {bits: Plan.load(f"configs/plans/vit_{bits}.yaml") for bits in ("w4a4", "binary")}
    binary = BinaryQuantizers(shift=DynamicShift)
    models = [("float", qat.timm_model(name, model_args={"depth": depth}))]
    for label, convert, plan, factory in (
        ("W4A4 LSQ", qat.convert_, plans["w4a4"], LSQ),
        ("binary plain", qat.convert_, plans["binary"], binary),
        ("binary react", react_, plans["binary"], binary),
    ):
        model = qat.timm_model(name, model_args={"depth": depth})
        convert(model, plan, factory)
        qat.calibrate(model, [images[:2]])
        models.append((label, model))
    return models


def step(model: nn.Module, images: torch.Tensor, compiled: bool = False) -> Step:
    """Forward, cross-entropy and backward; compiled as one graph, with products in bfloat16."""
    labels = torch.zeros(len(images), dtype=torch.long)
    model.train()
    if compiled:
        model.compile(fullgraph=True)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=compiled):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()

    return run


def report(times: dict[tuple[str, str], list[float]], arguments: argparse.Namespace) -> None:
    """Print milliseconds and ratios to both baselines."""
    table = Table("step", "matmul precision", "ms, median", "x float", "x float medium")
    for (name, precision), seconds in times.items():
        cells = [name, precision, f"{1e3 * statistics.median(seconds):,.0f}"]
        for baseline in (("float", "highest"), ("float", "medium")):
            ratios = [a / b for a, b in zip(seconds, times[baseline], strict=True)]
            middle = statistics.median(ratios)
            cells.append(f"{middle:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
        table.add_row(*cells)
    words = vars(arguments)
    Console().print(f"torch {torch.__version__}, {words}", table)


if __name__ == "__main__":
    main()

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
`fit` does with `trainer.compile: true` and `trainer.precision: bf16-mixed`. `--peer` adds torchao's
quantization-aware training, which quantizes linear layers alone, and LSQ on the same layers;
`pip install torchao` first. `--depth` shortens the model. *Saved* is what a step keeps from the
forward pass for the backward pass, the weights apart.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import qat
from binaryvit import BinaryQuantizers
from binaryvit.asm import DynamicShift
from binaryvit.convert import react_
from qat.plan import Plan, Rule
from qat.quantizers import LSQ
from qat.spec import Granularity, QuantSpec

Step = Callable[[], None]
COMPILED = ", compiled, bf16"
BASELINES = {
    "x_float": ("float", "highest"),
    "x_float_medium": ("float", "medium"),
    "x_float_compiled": (f"float{COMPILED}", "medium"),
}
FOUR = QuantSpec(4, granularity=Granularity.PER_CHANNEL)
LINEARS = Plan(
    (Rule("patch_embed.proj", reason="no linear layer"), Rule("*", weight=FOUR, input=QuantSpec(4)))
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--rows", type=Path, help="file that gets a line of JSON for each step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 64  # the variants share the code of timm's forward
    torch.manual_seed(0)
    images = torch.randn(arguments.batch, 3, 224, 224)
    steps, saved = {}, {}
    for compiled in (False, True)[: 1 + arguments.compiled]:
        for name, model in variants(arguments, images):
            name += COMPILED if compiled else ""
            steps[name] = step(model, images, compiled)
            saved[name] = saved_bytes(model, steps[name])
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
    rows = measured(times, saved)
    if arguments.rows is not None:
        arguments.rows.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    report(rows, arguments)


def variants(
    arguments: argparse.Namespace, images: torch.Tensor
) -> Iterator[tuple[str, nn.Module]]:
    """The float model and its converted copies, calibrated."""
    make = partial(qat.timm_model, arguments.model, model_args={"depth": arguments.depth})
    plans = {bits: Plan.load(f"configs/plans/vit_{bits}.yaml") for bits in ("w4a4", "binary")}
    binary = BinaryQuantizers(shift=DynamicShift)
    conversions = [
        ("W4A4 LSQ", qat.convert_, plans["w4a4"], LSQ),
        ("binary plain", qat.convert_, plans["binary"], binary),
        ("binary react", react_, plans["binary"], binary),
    ]
    yield "float", make()
    if arguments.peer:
        yield "W4A4 torchao, linears", torchao_(make())
        conversions.append(("W4A4 LSQ, linears", qat.convert_, LINEARS, LSQ))
    for label, convert, plan, factory in conversions:
        model = make()
        convert(model, plan, factory)
        qat.calibrate(model, [images[:2]])
        yield label, model


def torchao_(model: nn.Module) -> nn.Module:
    """Four bits in all linear layers, by torchao: weights by channel, inputs by token."""
    from torchao.quantization import quantize_  # pyright: ignore
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig  # pyright: ignore

    four: Any = torch.int4  # pyright: ignore
    inputs = IntxFakeQuantizeConfig(four, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(four, "per_channel")
    config = QATConfig(activation_config=inputs, weight_config=weights, step="prepare")
    quantize_(model, config)
    return model


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


def saved_bytes(model: nn.Module, run: Step) -> int:
    """Bytes that a step saves for its backward pass, the model's own tensors apart."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def measured(
    times: dict[tuple[str, str], list[float]], saved: dict[str, int]
) -> list[dict[str, Any]]:
    """A row for each step and precision: seconds, ratios to the baselines, what it saves."""
    known = {key: name for key, name in BASELINES.items() if name in times}
    return [
        {
            "step": name,
            "precision": precision,
            "seconds": statistics.median(seconds),
            "saved_bytes": saved[name],
            **{key: _ratios(seconds, times[baseline]) for key, baseline in known.items()},
        }
        for (name, precision), seconds in times.items()
    ]


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Median, smallest and largest over the rounds."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print milliseconds, ratios to the baselines, and what a step saves."""
    keys = [key for key in BASELINES if key in rows[0]]
    table = Table("step", "matmul precision", "ms, median", *keys, "saved, MB")
    for row in rows:
        ratios = ["{:.2f} [{:.2f}, {:.2f}]".format(*row[key]) for key in keys]
        cells = [row["step"], row["precision"], f"{1e3 * row['seconds']:,.0f}", *ratios]
        table.add_row(*cells, f"{row['saved_bytes'] / 1e6:.0f}")
    Console().print(f"torch {torch.__version__}, {vars(arguments)}", table)


if __name__ == "__main__":
    main()

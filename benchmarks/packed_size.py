"""Bytes of packed files against the float32 safetensors of the same models, random weights.

    python benchmarks/packed_size.py

BinaryViT's abstract states 16.2x for DeiT-S, by a count of its own.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qat
from binaryvit import BinaryQuantizers
from binaryvit.convert import react_
from qat import Plan
from qat.export.measure import float_bytes
from qat.export.pack import export_packed, packed_bytes
from qat.quantizers import LSQ, Affine, QuantizerFactory

PLANS = Path(__file__).parents[1] / "configs" / "plans"
BINARY, FOUR = PLANS / "vit_binary_edges8.yaml", PLANS / "vit_w4a4.yaml"


@dataclass(frozen=True)
class Case:
    """A model, how it is quantized, and how much smaller its file is to be.

    Attributes:
        name: timm's name of the model.
        words: How it is quantized, in words.
        plan: The plan.
        factory: The quantizers.
        convert: The conversion.
        half: Whether what are no codes is kept in 16 bits.
        goal: Least ratio of sizes; None where none was set.
    """

    name: str
    words: str
    plan: Plan
    factory: QuantizerFactory
    convert: Callable[..., Any] = qat.convert_
    half: bool = False
    goal: float | None = None


def cases() -> list[Case]:
    """What is measured."""
    binary, made = Plan.load(BINARY), BinaryQuantizers()
    small, tiny = "deit_small_patch16_224", "deit_tiny_patch16_224"
    return [
        Case(small, "binary plain", binary, made),
        Case(small, "binary plain, half", binary, made, half=True, goal=21),
        Case(small, "binary react", binary, made, react_),
        Case(small, "binary react, half", binary, made, react_, half=True, goal=20),
        Case(tiny, "binary plain", binary, made),
        Case(tiny, "binary plain, half", binary, made, half=True, goal=16),
        Case(tiny, "binary react", binary, made, react_),
        Case(tiny, "binary react, half", binary, made, react_, half=True, goal=15),
        Case(small, "w4a4, LSQ", Plan.load(FOUR), LSQ),
        Case(small, "w4a4, zero points", Plan.uniform(4, 4), Affine, goal=7.5),
        Case(small, "w4a4, zero points, half", Plan.uniform(4, 4), Affine, half=True, goal=7.5),
    ]


def measure(case: Case, folder: Path) -> tuple[int, int, int]:
    """Bytes of the float file, of the packed one, and what was predicted for it."""
    model = qat.timm_model(case.name).eval()
    before = float_bytes(model)
    case.convert(model, case.plan, case.factory)
    predicted = packed_bytes(model, half=case.half)
    qat.set_phase(model, qat.Phase.QUANTIZE)
    path = folder / "model.lowbit"
    export_packed(model, path, half=case.half)
    return before, path.stat().st_size, predicted


def main() -> None:
    """Print the table; fail where a goal is missed or a prediction is wrong."""
    print("| model | plan | float bytes | packed bytes | predicted | ratio | goal |")
    print("|---|---|---:|---:|---:|---:|---:|")
    missed = []
    for case in cases():
        with tempfile.TemporaryDirectory() as folder:
            before, after, predicted = measure(case, Path(folder))
        goal = "-" if case.goal is None else f"{case.goal:g}x"
        ratio = before / after
        print(
            f"| {case.name} | {case.words} | {before:,} | {after:,} | {predicted:,} | {ratio:.2f}x "
            f"| {goal} |",
            flush=True,
        )
        if predicted != after or ratio < (case.goal or 0):
            missed.append(f"{case.name} {case.words}")
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()

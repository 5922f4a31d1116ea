"""Writes docs/results.md and the table of README.md from what `docs/results` records.

python benchmarks/results.py
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

import binaryvit_report
import starts_report
from adapt_report import spread

from qat import disk
from qat.cli import ledger
from qat.cli.ledger import Question, Row

PAGE, README = ledger.ROOT / "docs" / "results.md", ledger.ROOT / "README.md"
SPEEDS, PARITIES, ONNX_FILES, STEPS, METHODS, PARTS = (
    ledger.ROOT / "docs" / "results" / name
    for name in (
        "inference.jsonl", "parity.jsonl", "onnx.jsonl", "train_step.jsonl", "val650_methods.json",
        "val650_parts.json",
    )
)  # fmt: skip
COMPILED = ", compiled, bf16"
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"
Run = dict[str, Any]
HEAD = """# Results

Written by `python benchmarks/results.py` from the [recorded runs](results/ledger.jsonl).
`train.py reproduce NAME` runs a row again and says whether its number holds;
`benchmarks/ledger.yaml` has the names. Rows of ImageNet need [assets](assets.md). A value is the
mean of the recorded runs; the band is how far the next may lie from it. *Agreement* is the share of
images that the float model answers alike. *Logit error* is how far the outputs before the softmax
are from the float model's, relative to them.
"""
SPEED = """## How fast is a binary model?

DeiT with binary blocks and random weights, as a packed file, beside float and int8 engines. All
run in turns in one process, on one thread of an Intel Xeon with AMX. Times are processor time, the
median of the rounds. *Medium* is torch with `set_float32_matmul_precision("medium")`, *react with
A2* a model with shortcuts and with thresholds that follow the image.
*Times ours* is the ratio to `ours`, the median of the rounds with the smallest and the largest.
The [rows](results/inference.jsonl) are written by
`python benchmarks/inference.py --models deit_small_patch16_224 deit_tiny_patch16_224 --rows FILE`.

| model | images | engine | ms | times ours |
|---|---:|---|---:|---:|
"""
FAST = """**What does one bit save?** A binary DeiT-S of random weights, packed, takes
{small:.1f} MB and {fast:.1f} ms an image, on one thread of a Xeon with AMX. In float it takes
{large:.1f} MB and {slow:.1f} ms by the fastest engine,
{engine} (`python benchmarks/inference.py --batches 1`).
"""
PARITY = """## Does a packed file answer as the model it comes from?

The simulated model and the packed file, on every evaluation image. A gap is the largest difference
of the logits of an image. *On threshold* counts gaps beyond rounding that begin with a value within
1e-5 of the threshold between two codes, *faults* those that do not. *Codes* are compared given the
same values. How far logits move after a flip depends on the model: the simulated ViT-Ti
itself moves by a median of 4.3 (W4A4) and 0.8 (W8A8) when its images change by 3e-7 of their size
(`python benchmarks/rounding.py FILE`).
The [rows](results/parity.jsonl) hold more. A row of `export` needs its model first:
`train.py fit --config default --run_dir runs/default`, or `train.py quantize --config
ptq/imagenet_vit_tiny_w8a8_repq --run_dir runs/w8a8`, and likewise `w4a4`.

| model | images | agree | median gap | worst | on threshold | faults | codes | others | command |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---|
"""
ONNX = """## Does an ONNX file answer as the model it comes from?

The simulated model and its ONNX file in ONNX Runtime. *Faults* are gaps of the logits that do not
begin with a value on the threshold between two codes. *On integers* counts matrix products.
When a code flips, a coarse model moves as far as its gaps, as the text above says.
Models without a width have eight bits and random weights; there a zero point may lie outside of its
eight bits, and that product stays in float. The [rows](results/onnx.jsonl) are what
`python benchmarks/onnx_parity.py vit --num_images 100`, then `others` and `families` print.

| model | images | same class | median gap | worst gap | faults | codes | wrong | on integers |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
"""

CALIBRATED = """## What can be had without training?

The ViT-Ti and the 650 photos
[above](#what-do-few-bits-keep-and-what-do-minutes-buy), three draws of the photos that set the
quantizers: the mean with the deviation of one draw. Seconds are those of calibration, on one
thread. *dopq_calib* is DopQ-ViT's calibration
(reconstructed), *repq_token* the same attention maps (TanQ) with RepQ-ViT's other ranges searched
by the error of each token; 32 photos where no number stands. The
[rows](results/val650_methods.json) are the `metrics.json` of
`train.py quantize --config ptq/compare_val650`.

| bits | method | top-1 | agreement | logit error | seconds |
|---|---|---:|---:|---:|---:|
"""
PARTS_OF = """## What does each part of MGRQ bring?

The same model and photos at W4A4, one draw: a point between two rows is no difference. All train
block by block for a minute or a few, on 32 photos and 96 augmented copies. *Block* compares the
outputs of blocks (OBWR), *global* adds the importance of tokens, *logits* the logits of the rest of
the model (both EBGS), *local* the outputs of layers (IBLS); *mgrq* has the first, second and last.
*dopq* is DopQ-ViT in full. All of them are reconstructions. The
[rows](results/val650_parts.json) are runs of `train.py quantize --config ptq/compare_mgrq`, on a
busy machine, whence the seconds. [Three draws](archive/log_2026-11.md) on other photos agree.

| bits | method | top-1 | agreement | logit error | seconds |
|---|---|---:|---:|---:|---:|
"""
STEP = """## What does a training step cost?

Forward, cross-entropy and backward of a ViT-Ti of two blocks, batch 8, one thread of an Intel Xeon
with AMX, in units of the float step of the same kind: the median of the rounds with the smallest
and the largest. *Eager* is torch's default in float32, *compiled* is `trainer.compile: true` with
`trainer.precision: bf16-mixed`. *Saved* is what the forward pass keeps for the backward pass.
torchao quantizes linear layers alone; LSQ on the same layers stands beside it.
The [rows](results/train_step.jsonl) are written by `python benchmarks/train_step.py
--depth 2 --batch 8 --peer --compiled --rows docs/results/train_step.jsonl`.

| step | eager | saved, MB | compiled | saved, MB |
|---|---:|---:|---:|---:|
"""


def page(questions: Iterable[Question], runs: list[Run]) -> str:
    """The page of all questions."""
    parts = [_section(question, runs) for question in questions]
    tables = (
        CALIBRATED + _methods(METHODS),
        PARTS_OF + _methods(PARTS),
        SPEED + _lines(_speed, SPEEDS),
        PARITY + _lines(_parity, PARITIES),
        ONNX + _lines(_onnx, ONNX_FILES),
        STEP + _steps(),
        binaryvit_report.section(),
        starts_report.section(),
    )
    return "\n".join([HEAD, *parts, *tables])


def _lines(line: Callable[[Run], str], path: Path) -> str:
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    return "".join(f"| {line(row)} |\n" for row in rows)


def _speed(row: Run) -> str:
    spread = f"{row['times_ours_least']:.1f} to {row['times_ours_most']:.1f}"
    times = f"{row['times_ours']:.1f} ({spread})"
    milliseconds = f"{1e3 * row['seconds_median']:.1f}"
    return " | ".join([row["model"], str(row["batch"]), row["engine"], milliseconds, times])


def _parity(row: Run) -> str:
    gaps = f"{row['logit_gap_median']:.1e} | {row['logit_gap']:.1e}"
    traced = f"{row['n_gaps'] - row['n_faults']:,} | {row['n_faults']:,}"
    counts = f"{row['n_images']:,} | {row['agreement']:.4f} | {gaps} | {traced}"
    codes = f"{row['n_codes']:,} | {row['n_codes_wrong'] + row['n_codes_on_threshold']:,}"
    return f"{row['model']} | {counts} | {codes} | `{row['command']}`"


def _onnx(row: Run) -> str:
    gaps = f"{row['logit_gap_median']:.1e} | {row['logit_gap']:.1e}"
    codes = f"{row['n_faults']} | {row['n_codes']:,} | {row['n_codes_wrong']}"
    integers = f"{row['n_products_int_onnxruntime']} of {row['n_products']}"
    counts = f"{row['n_images']} | {row['agreement']:.2f} | {gaps} | {codes} | {integers}"
    return f"{row['name']} | {counts}"


def _methods(path: Path) -> str:
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for row in json.loads(path.read_text())["table"]:
        groups[row["bits"], row["method"]].append(row)
    lines = []
    for names, rows in groups.items():
        columns = [[row[key] for row in rows] for key in ("top1", "agreement", "logit_error")]
        cells = [spread(column, 4) for column in columns]
        cells.append(f"{fmean(row['seconds_calibration'] for row in rows):.0f}")
        lines.append(f"| {' | '.join([*names, *cells])} |\n")
    return "".join(lines)


def _steps(path: Path = STEPS) -> str:
    rows = {(r["step"], r["precision"]): r for r in map(json.loads, path.read_text().splitlines())}
    lines = []
    for name, precision in rows:
        if COMPILED in name or precision != "highest":
            continue
        kinds = (
            (rows[name, precision], "x_float"),
            (rows[name + COMPILED, "medium"], "x_float_compiled"),
        )
        cells = [
            "{:.2f} ({:.2f} to {:.2f}) | {:.0f}".format(*row[unit], row["saved_bytes"] / 1e6)
            for row, unit in kinds
        ]
        lines.append(f"| {' | '.join([name, *cells])} |\n")
    return "".join(lines)


def _section(question: Question, runs: list[Run]) -> str:
    return f"## {question.question}\n\n{fill(question.about, 170)}\n\n{table(question, runs)}"


def table(question: Question, runs: list[Run]) -> str:
    """A question's rows, each above the command that gives it."""
    heads = ["", *question.columns.values(), "band", "runs", "command"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 2)}---|"]
    lines += [_line(row, question, runs) for row in question.rows if _of(row, runs)]
    return "\n".join([*lines, ""])


def short_table(question: Question, runs: list[Run]) -> str:
    """The same for the README: of the rows it shows, the number that `reproduce` compares."""
    known = {row.name: row for row in question.rows}
    lines = [fill(f"**{question.question}** {question.about}", 170), ""]
    lines += [f"|  | {next(iter(question.columns.values()))} | command |", "|---|---:|---|"]
    for row in map(known.__getitem__, question.readme):
        value = _shown(ledger.expected(row, runs).value)
        lines.append(f"| {row.label} | {value} | `python train.py reproduce {row.name}` |")
    return "\n".join([*lines, ""])


def _line(row: Row, question: Question, runs: list[Run]) -> str:
    found = _of(row, runs)
    band = f"{row.measure} ± {ledger.expected(row, runs).band:.3f}"
    cells = [row.label, *_cells(question, found), band, str(len(found)), f"`{row.command}`"]
    return f"| {' | '.join(cells)} |"


def _of(row: Row, runs: list[Run]) -> list[Run]:
    return [run for run in runs if run["name"] == row.name]


def _cells(question: Question, found: list[Run]) -> list[str]:
    values = [[run["measures"][key] for run in found] for key in question.columns]
    return [_shown(fmean(column)) for column in values]


def _shown(value: float) -> str:
    return f"{value:.4f}" if value < 2 else f"{value:,.0f}"


def speed(path: Path = SPEEDS) -> str:
    """For the README: DeiT-S by the fastest float engine, and on one bit as a packed file."""
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    rows = [row for row in rows if row["model"] == "deit_small_patch16_224" and row["batch"] == 1]
    floats = [row for row in rows if row["engine"].endswith("float32")]
    best = min(floats, key=lambda row: row["seconds_median"])
    ours, full = (
        next(row for row in rows if row["engine"] == name) for name in ("ours", "torch float32")
    )
    return FAST.format(
        small=ours["size_bytes"] / 1e6,
        large=full["size_bytes"] / 1e6,
        fast=1e3 * ours["seconds_median"],
        slow=1e3 * best["seconds_median"],
        engine=best["engine"].removesuffix(" float32"),
    )


def with_table(text: str, shown: str) -> str:
    """A text with its table replaced."""
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        raise ValueError(f"the table needs a place between the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{shown}\n{END}{after}"


def write(page_path: Path = PAGE, readme: Path = README) -> None:
    """Write both."""
    questions, runs = ledger.questions(), ledger.runs()
    disk.write(page_path, page(questions, runs))
    shown = [short_table(question, runs) for question in questions if question.readme]
    disk.write(readme, with_table(readme.read_text(), "\n".join([*shown, speed()])))


if __name__ == "__main__":
    write()

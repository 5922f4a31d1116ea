"""The rows of `starts.py` as a section of docs/results.md, which `results.py` writes."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

ROWS = Path(__file__).parents[1] / "docs" / "results" / "starts.jsonl"
BITS = {"w4a4": "W4A4", "pmq": "PMQ at the operations of W4A4", "w2a2": "W2A2", "binary": "one bit"}
STARTS = {
    "minmax": "smallest to largest value",
    "mse": "least error",
    "lsq": "LSQ's own, signed grids",
    "repq": "RepQ-ViT",
    "mgrq": "MGRQ",
    "plain": "the teacher's weights",
}
SECTION = """## Where should training on few bits start?

ViT-Ti at 64 pixels on Imagenette: top-1 on {images:,} photos before training, and after one and
five epochs of the same run on 5,000 photos. The teacher, whose soft labels train it, has
{teacher:.4f}. W2A2 keeps patch embedding and classifier on 8 bits. Learning rates are chosen on a
held-out tenth of the training photos. Brackets hold the range over seeds, where there are two.
The [rows](results/starts.jsonl) are written by
`python benchmarks/starts.py --rows docs/results/starts.jsonl`.

| bits | start | seeds | epoch 0 | epoch 1 | epoch 5 |
|---|---|---:|---:|---:|---:|
{table}
{verdict}"""
VERDICT = """\
- At four bits RepQ-ViT and MGRQ end alike, the least error a little lower; the range from the
  smallest to the largest value and LSQ's own start stay behind. MGRQ alone is nearly as good as
  five epochs, and training first loses some of that.
- PMQ's plan is ten points ahead of uniform widths from the same start before training, and one
  point after five epochs, at the same operations.
- At two bits no start answers anything yet. LSQ's own start, from the mean size of the values and
  on grids without a zero point, ends far above all that fit the float model; of those MGRQ is best.
- On one bit RepQ-ViT's weights end where the teacher's own do.
- Where one seed stands, a point between two starts is no difference. Cures for oscillation are not
  measured: the command continues with them.
"""


def section(path: Path = ROWS) -> str:
    """The section of the page."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["evaluated_on"] == "val" and row["settings"]["cure"] is None:
            groups[row["settings"]["bits"], row["settings"]["start"]].append(row["metrics"])
    order = [(bits, start) for bits in BITS for start in STARTS if (bits, start) in groups]
    table = "".join(f"| {_line(*names, groups[names])} |\n" for names in order)
    first = groups[order[0]][0]
    return SECTION.format(
        images=first["images"], teacher=rows[0]["teacher_top1"], table=table, verdict=VERDICT
    )


def _line(bits: str, start: str, found: list[dict[str, Any]]) -> str:
    epochs = [f"{fmean(top1):.4f}" for top1 in zip(*(m["top1"] for m in found), strict=True)]
    last = [metrics["top1"][-1] for metrics in found]
    if len(last) > 1:
        epochs[-1] += f" ({min(last):.4f} to {max(last):.4f})"
    return " | ".join([BITS[bits], STARTS[start], str(len(found)), *epochs])

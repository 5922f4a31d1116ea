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
    "mse": "least error, of RepQ-ViT's ranges",
    "lsq": "LSQ's own, signed grids",
    "lsq_mse": "least error, of RepQ-ViT's ranges, signed grids",
    "narrow": "least error, narrower ranges too",
    "repq": "RepQ-ViT",
    "mgrq": "MGRQ",
    "plain": "the teacher's weights",
}
SECTION = """## Where should training on few bits start?

ViT-Ti at 64 pixels on Imagenette: top-1 on {images:,} photos before training, and after one and
five epochs of the same run on 5,000 photos. The teacher, whose soft labels train it, has
{teacher:.4f}. W2A2 keeps patch embedding and classifier on 8 bits. Learning rates are chosen on a
held-out tenth of the training photos. Brackets hold the range over seeds.
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
- At two bits hardly a start answers anything yet, and how much of the values the ranges cut off
  decides. Where narrower ranges are tried too, the least error ends highest, and MGRQ, which starts
  there, gains nothing more. The candidates of RepQ-ViT's code are for four bits and more. LSQ's own
  start lies between. Its grids have no zero point and are no gain: on them, RepQ-ViT's ranges end
  lower.
- On one bit RepQ-ViT's weights end where the teacher's own do.
"""
CURES = {
    None: "none",
    "pull": "pull to the code, in units of the gradient",
    "dampen": "dampening",
    "freeze": "freezing",
}
CURED = """
## Do cures for oscillating weights help at two bits?

The same runs at W2A2 from the start with narrow ranges. A weight *oscillates* if its code turned
back in more than 0.5 % of the steps, by a moving average; *flips* is the share of codes that a
step changes, the mean over training. Dampening and freezing are those of
[Nagel et al.](https://arxiv.org/abs/2203.11086), the pull is ours. The strength of each is the
better of two on held-out photos.

| cure | strength | seeds | top-1 | flips | oscillating, at the end |
|---|---:|---:|---:|---:|---:|
{table}
{verdict}"""
CURED_VERDICT = """\
- No cure gains in five epochs. The pull and dampening, at their weaker strengths, change no more
  than a seed does; their stronger ones were worse on held-out photos.
- Freezing does what it is for, hardly a weight oscillates, and costs 17 points: in so short a
  training it holds weights that still have to move.
"""
Metrics = dict[str, Any]


def section(path: Path = ROWS) -> str:
    """The section of the page."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    starts: dict[tuple[str, str], list[Metrics]] = defaultdict(list)
    cures: dict[tuple[str | None, float], list[Metrics]] = defaultdict(list)
    for row in rows:
        found, metrics = row["settings"], row["metrics"]
        if row["evaluated_on"] != "val":
            continue
        if found["cure"] is None:
            starts[found["bits"], found["start"]].append(metrics)
        if (found["bits"], found["start"]) == ("w2a2", "narrow"):
            cures[found["cure"], found["strength"]].append(metrics)
    order = [(bits, start) for bits in BITS for start in STARTS if (bits, start) in starts]
    cured = sorted(cures, key=lambda names: list(CURES).index(names[0]))
    return SECTION.format(
        images=starts[order[0]][0]["images"],
        teacher=rows[0]["teacher_top1"],
        table="".join(f"| {_line(*names, starts[names])} |\n" for names in order),
        verdict=VERDICT,
    ) + CURED.format(
        table="".join(f"| {_cured(*names, cures[names])} |\n" for names in cured),
        verdict=CURED_VERDICT,
    )


def _line(bits: str, start: str, found: list[Metrics]) -> str:
    before, first = (fmean(metrics["top1"][i] for metrics in found) for i in (0, 1))
    cells = [str(len(found)), f"{before:.4f}", f"{first:.4f}", _last(found)]
    return " | ".join([BITS[bits], STARTS[start], *cells])


def _cured(cure: str | None, strength: float, found: list[Metrics]) -> str:
    flips = fmean(fmean(metrics["flip_rate_by_epoch"]) for metrics in found)
    oscillating = fmean(metrics["oscillating_by_epoch"][-1] for metrics in found)
    shown = "" if cure is None else f"{strength:g}"
    cells = [str(len(found)), _last(found), f"{flips:.3%}", f"{oscillating:.2%}"]
    return " | ".join([CURES[cure], shown, *cells])


def _last(found: list[Metrics]) -> str:
    """Mean of the last top-1, and its range over seeds."""
    last = [metrics["top1"][-1] for metrics in found]
    ends = f" ({min(last):.4f} to {max(last):.4f})" if len(last) > 1 else ""
    return f"{fmean(last):.4f}{ends}"

"""Where should quantization-aware training start? Starts, plans and cures compared on Imagenette.

    python benchmarks/starts.py --rows docs/results/starts.jsonl
    python benchmarks/starts.py --job starts-w4a4-repq-s0 --rows FILE
    python benchmarks/starts.py --table --rows FILE

ViT-Ti/16 at 64 pixels, from a float teacher whose soft labels alone train it; data and teacher are
those of `binaryvit_runs.py`, but a fixed choice of 5,000 training images, of which 256 calibrate.
AdamW without decay, batch 64, five epochs. Every number is read before training, after one epoch
and after five of the *same* run, whose cosine schedule ends at epoch five: that of epoch one is on
the way, not what a training of one epoch would reach.

The phases, each of which starts when the one before is complete:

    lr        learning rate of each width, from MSE          judged on held-out images
    starts    W4A4 and W2A2 from each start, two seeds       judged on `val`
    plans     PMQ at the operations of W4A4, from RepQ       judged on `val`
    binary    one bit, from plain and from RepQ's weights    judged on `val`
    strength  two strengths of each cure at W2A2, `narrow`   judged on held-out images
    cures     the better strength, two seeds                 judged on `val`

LSQ itself has no zero point, and RepQ-ViT cannot do without: it folds a channel's offset into the
norm and leaves one for all. So all starts share `Affine` with trained scales, which has LSQ's
gradient and a fixed zero point, and differ in nothing but the start; attention maps are uniform
too. The arm `lsq` is the quantizer LSQ with signed grids from its own start. Two arms of W2A2 tell
what that start owes to its grids and what to its steps: `lsq_mse` has the grids with the ranges of
`mse`, those of RepQ-ViT's code; `narrow` has the other grids with the default candidates of least
error, of which some cut off more on so few bits. W2A2 keeps patch embedding and classifier on 8
bits. PMQ is compared with `w4a4-repq`, each cure with `w2a2-narrow`. A tenth of the training images
is held out, and only from what is judged on it. The rate of `binary` is the best of the phase `lr`
of `binaryvit_runs.py`. Codes are watched in every fifth layer.
"""

import statistics
from collections import defaultdict
from dataclasses import asdict, replace

import jobs
from jobs import Row
from rich.table import Table
from starts_train import Job, train

RATES = (3e-4, 1e-3)
BINARY_RATE = 1e-3
SEEDS = (0, 1)
STARTS = ("minmax", "mse", "repq", "mgrq", "lsq")
WHY = ("lsq_mse", "narrow")
STRENGTHS = {"pull": (0.03, 0.3), "dampen": (3e-4, 3e-3), "freeze": (0.02, 0.01)}


def phases(rows: list[Row], finished: set[str]) -> list[list[Job]]:
    """The jobs of every phase whose settings are known from finished phases before."""
    widths = ("w4a4", "w2a2")
    found = [[Job("lr", f"{bits}-lr{lr:g}", bits, "mse", lr) for bits in widths for lr in RATES]]
    if not jobs.complete(found[0], finished):
        return found
    lr = {bits: _best(rows, "lr", f"{bits}-").lr for bits in widths}
    found.append([Job("starts", f"{b}-{s}", b, s, lr[b]) for s in STARTS for b in widths])
    found[-1] += [Job("starts", f"w2a2-{s}", "w2a2", s, lr["w2a2"]) for s in WHY]
    found.append([Job("plans", "pmq-repq", "pmq", "repq", lr["w4a4"])])
    found.append([Job("binary", s, "binary", s, BINARY_RATE) for s in ("plain", "repq")])
    seeded = [[replace(job, seed=seed) for job in phase] for seed in SEEDS for phase in found[1:]]
    found = [found[0], *seeded]
    searched = [
        Job("strength", f"{cure}-{strength:g}", "w2a2", "narrow", lr["w2a2"], 0, cure, strength)
        for cure, strengths in STRENGTHS.items()
        for strength in strengths
    ]
    found.append(searched)
    if not jobs.complete([job for phase in found for job in phase], finished):
        return found
    chosen = [_best(rows, "strength", f"{cure}-") for cure in STRENGTHS]
    cures = [replace(job, stage="cures", arm=str(job.cure)) for job in chosen]
    return [*found, [replace(job, seed=seed) for seed in SEEDS for job in cures]]


def table(rows: list[Row]) -> Table:
    """Means over seeds of top-1 after each number of epochs, and the range of the last."""
    heads = ("stage", "arm", "seeds", "epoch 0", "epoch 1", "epoch 5", "range", "loss")
    shown = Table(*heads, "flips", "oscillating", "bits W", "bits A", "cpu s")
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["stage"], row["arm"]].append(row["metrics"])
    for (stage, arm), found in groups.items():
        top1 = [f"{statistics.fmean(e):.4f}" for e in zip(*(m["top1"] for m in found), strict=True)]
        last = [metrics["top1"][-1] for metrics in found]
        cells = [
            [metrics["loss"][-1] for metrics in found],
            [statistics.fmean(metrics["flip_rate_by_epoch"]) for metrics in found],
            [metrics["oscillating_by_epoch"][-1] for metrics in found],
            [metrics["mean_bits_weight"] for metrics in found],
            [metrics["mean_bits_activation"] for metrics in found],
            [metrics["cpu_seconds_in_all"] for metrics in found],
        ]
        means = [f"{statistics.fmean(cell):.3g}" for cell in cells]
        shown.add_row(stage, arm, str(len(last)), *top1, f"{max(last) - min(last):.4f}", *means)
    return shown


def _best(rows: list[Row], stage: str, arm: str) -> Job:
    """Of a stage's jobs whose arm begins so, that of highest top-1; lower loss breaks ties."""
    found = [row for row in rows if row["stage"] == stage and row["arm"].startswith(arm)]
    row = max(found, key=lambda row: (row["metrics"]["top1"][-1], -row["metrics"]["loss"][-1]))
    return Job(**{key: row["settings"][key] for key in asdict(Job("", "", "", "", 0.0))})


if __name__ == "__main__":
    jobs.main(__doc__, "starts", phases, train, table)

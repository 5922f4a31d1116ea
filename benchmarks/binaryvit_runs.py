"""Does GRS, does ASM, do both gain over a strong binary baseline? BinaryViT's claim on Imagenette.

    python benchmarks/binaryvit_runs.py --rows docs/results/binaryvit_imagenette.jsonl
    python benchmarks/binaryvit_runs.py --job core-asm-s0 --rows FILE
    python benchmarks/binaryvit_runs.py --table --rows FILE

BinaryViT here is a *reconstruction*, see `binaryvit`. Binary ViT-Ti/16 at 64 pixels, `react`
blocks, starting from the weights of a float teacher whose soft labels alone train it; AdamW without
decay, cosine to zero, batch 64. Needs LOWBIT_ASSETS. Data and teacher: `binaryvit_data.py`.

The phases, each of which starts when the one before is complete; a finished job is one line of the
rows, so the command continues where it stopped, and may run once on each core at the same time:

    lr     learning rates of the baseline                        judged on held-out images
    grs    strengths and schedules of GRS G1                     judged on held-out images
    core   baseline, +grs, +asm (A2 for A1), +both, three seeds  judged on `val` once
    rest   other forms of ASM, one seed                          judged on `val` once
    again  the best of these forms, seeds 1 and 2, and with GRS  judged on `val` once
    rest   other forms of GRS, `plain` blocks, one seed          judged on `val` once

All settings after `grs` are the best on a held-out tenth of the *training* images in the first two
phases. One thing alone is chosen on `val`: which form of ASM `again` repeats, by seed 0, so that
seeds 1 and 2 judge it. Other forms take G1's best setting of their own coupling; G5's
share of damping has another meaning and is a fixed one half. As in `Training`, GRS changes
gradients before they are clipped, and weights after the step. Codes are watched at every step, in
every eighth row of each weight. A run that exceeds its processor time or diverges leaves no line
and is not tried again with the same cache.
"""

import statistics
from collections import defaultdict
from dataclasses import asdict, replace

import jobs
from binaryvit_train import Job, train
from jobs import Row
from rich.table import Table

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
GRID = [  # schedule, strength, decoupled
    *(("cosine_ramp", strength, False) for strength in (0.003, 0.01, 0.03, 0.1)),
    *(("constant", strength, False) for strength in (0.003, 0.01)),
    *(("last_tenth", strength, False) for strength in (0.03, 0.3)),
    *(("cosine_ramp", strength, True) for strength in (0.003, 0.03)),
]
SHIFTS = ("ScaledShift", "StandardizedShift")
FORMS = ("DistancePull", "SignPull", "BoundaryPull", "KurtosisPull")


def phases(rows: list[Row], finished: set[str]) -> list[list[Job]]:
    """The jobs of every phase whose settings are known from finished phases before."""
    found = [[Job("lr", f"lr{rate:g}", rate) for rate in RATES]]
    if not jobs.complete(found[-1], finished):
        return found
    base = _best(rows, "lr", Job("", "", 0.0))
    searched = [
        replace(
            base,
            stage="grs",
            arm=f"{schedule}-{strength:g}{'-decoupled' if decoupled else ''}",
            form="DistancePull",
            strength=strength,
            schedule=schedule,
            decoupled=decoupled,
        )
        for schedule, strength, decoupled in GRID
    ]
    found.append(searched)
    if not jobs.complete(searched, finished):
        return found
    base = replace(base, stage="core", arm="baseline")
    pulled = replace(_best(rows, "grs", base), stage="core", arm="grs")
    arms = [
        base,
        pulled,
        replace(base, arm="asm", shift="DynamicShift"),
        replace(pulled, arm="both", shift="DynamicShift"),
    ]
    core = [replace(job, seed=seed) for seed in range(3) for job in arms]
    found.append(core)
    if not jobs.complete(core, finished):
        return found
    shifted = [replace(base, stage="rest", arm=shift, shift=shift) for shift in SHIFTS]
    found.append(shifted)
    if not jobs.complete(shifted, finished):
        return found
    best = _best([row for row in rows if row["arm"] in SHIFTS], "rest", base)
    both = replace(pulled, stage="again", arm=f"{best.shift}-both", shift=best.shift)
    again = [replace(best, stage="again", seed=seed) for seed in (1, 2)]
    found.append([*again, *(replace(both, seed=seed) for seed in range(3))])
    rest = [replace(base, stage="rest", arm="plain", blocks="plain")]
    for decoupled in (False, True):
        kind = "decoupled" if decoupled else "coupled"
        ours = [row for row in rows if row["settings"]["decoupled"] is decoupled]
        best = replace(_best(ours, "grs", base), stage="rest")
        forms = [replace(best, arm=f"{form}-{kind}", form=form) for form in FORMS]
        rest += [job for job in forms if replace(job, stage="core", arm="grs") != pulled]
        if not decoupled:
            arm = "GradientDamping-coupled"
            rest.append(replace(best, arm=arm, form="GradientDamping", strength=0.5))
    return [*found, rest]


def table(rows: list[Row]) -> Table:
    """Means over seeds, with the deviation of one seed; curves by their last, flips by means."""
    shown = Table("stage", "arm", "seeds", "top1", "loss", "flips", "changed", "entropy", "dead")
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["stage"], row["arm"]].append(row["metrics"])
    for (stage, arm), found in groups.items():
        top1 = [metrics["top1"] for metrics in found]
        spread = f" ± {statistics.stdev(top1):.4f}" if len(top1) > 1 else ""
        cells = [
            [metrics["loss"] for metrics in found],
            [statistics.fmean(metrics["flip_rate"]) for metrics in found],
            [metrics["changed_in_all"][-1] for metrics in found],
            [metrics["sign_entropy"] for metrics in found],
            [metrics["dead_channels"] for metrics in found],
        ]
        means = [f"{statistics.fmean(cell):.3g}" for cell in cells]
        shown.add_row(stage, arm, str(len(top1)), f"{statistics.fmean(top1):.4f}{spread}", *means)
    return shown


def _best(rows: list[Row], stage: str, default: Job) -> Job:
    """The job of a stage with the highest top-1; lower loss breaks ties."""
    found = [row for row in rows if row["stage"] == stage]
    if not found:
        return default
    row = max(found, key=lambda row: (row["metrics"]["top1"], -row["metrics"]["loss"]))
    return Job(**{key: row["settings"][key] for key in asdict(default)})


if __name__ == "__main__":
    jobs.main(__doc__, "binaryvit_imagenette", phases, train, table)

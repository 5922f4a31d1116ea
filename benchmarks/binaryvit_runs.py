"""Does GRS, does ASM, do both gain over a strong binary baseline? BinaryViT's claim on Imagenette.

    python benchmarks/binaryvit_runs.py --rows docs/results/binaryvit_imagenette.jsonl
    python benchmarks/binaryvit_runs.py --job core-asm-s0 --rows FILE
    python benchmarks/binaryvit_runs.py --table --rows FILE

BinaryViT here is a *reconstruction*, see `binaryvit`. Binary ViT-Ti/16 at 64 pixels, `react`
blocks, starting from the weights of a float teacher whose soft labels alone train it; AdamW without
decay, cosine to zero, batch 64. Needs LOWBIT_ASSETS. Data and teacher: `binaryvit_data.py`.

The phases, each of which starts when the one before is complete; a finished job is one line of the
rows, so the command continues where it stopped, and may run once on each core at the same time:

    lr     learning rates of the baseline                        short, judged on held-out images
    grs    strengths and schedules of GRS G1                     short, judged on held-out images
    core   baseline, +grs, +asm (A2 for A1), +both, three seeds  long, judged on `val` once
    rest   other forms of GRS and ASM, `plain` blocks, one seed  long, judged on `val` once

All settings of the last two are the best on a held-out tenth of the *training* images in the first
two: nothing is chosen on `val`. Other forms take G1's best setting of their own coupling; G5's
share of damping has another meaning and is a fixed one half. As in `Training`, GRS changes
gradients before they are clipped, and weights after the step. Codes are watched at every step, in
every eighth row of each weight. A run that exceeds its processor time or diverges leaves no line
and is not tried again with the same cache.
"""

import argparse
import fcntl
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import binaryvit_data as data
import torch
from binaryvit_train import Job, Row, train
from rich.console import Console
from rich.table import Table

LONG = 12  # epochs, what the budget of processor hours allows; short runs take `Job`'s
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
GRID = [  # schedule, strength, decoupled
    *(("cosine_ramp", strength, False) for strength in (0.003, 0.01, 0.03, 0.1)),
    *(("constant", strength, False) for strength in (0.003, 0.01)),
    *(("last_tenth", strength, False) for strength in (0.03, 0.3)),
    *(("cosine_ramp", strength, True) for strength in (0.003, 0.03)),
]
FORMS = ("DistancePull", "SignPull", "BoundaryPull", "KurtosisPull")


def phases(rows: list[Row], finished: set[str]) -> list[list[Job]]:
    """The jobs of every phase whose settings are known from finished phases before."""
    found = [[Job("lr", f"lr{rate:g}", rate) for rate in RATES]]
    if not _complete(found[-1], finished):
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
    if not _complete(searched, finished):
        return found
    base = replace(base, stage="core", arm="baseline", epochs=LONG)
    pulled = replace(_best(rows, "grs", base), stage="core", arm="grs", epochs=LONG)
    arms = [
        base,
        pulled,
        replace(base, arm="asm", shift="DynamicShift"),
        replace(pulled, arm="both", shift="DynamicShift"),
    ]
    core = [replace(job, seed=seed) for seed in range(3) for job in arms]
    found.append(core)
    if not _complete(core, finished):
        return found
    rest = [
        replace(base, stage="rest", arm=shift, shift=shift)
        for shift in ("ScaledShift", "StandardizedShift")
    ]
    rest.append(replace(base, stage="rest", arm="plain", blocks="plain"))
    for decoupled in (False, True):
        kind = "decoupled" if decoupled else "coupled"
        ours = [row for row in rows if row["settings"]["decoupled"] is decoupled]
        best = replace(_best(ours, "grs", base), stage="rest", epochs=LONG)
        forms = [replace(best, arm=f"{form}-{kind}", form=form) for form in FORMS]
        rest += [job for job in forms if replace(job, stage="core", arm="grs") != pulled]
        if not decoupled:
            arm = "GradientDamping-coupled"
            rest.append(replace(best, arm=arm, form="GradientDamping", strength=0.5))
    return [*found, rest]


def work(path: Path, cache: Path, only: str | None, once: bool) -> None:
    """Do jobs until none is left; wait where others hold the last ones of a phase."""
    while not (cache / "data.pt").exists():
        if not _claim(cache, "data"):
            time.sleep(10)
        elif not (cache / "data.pt").exists():
            data.make(cache / "data.pt")
            (cache / "data.claim").unlink()
    while True:
        rows = read(path)
        names = {f"{row['stage']}-{row['arm']}-s{row['seed']}" for row in rows}
        failed = {file.stem for file in cache.glob("*.failed")}
        known = phases(rows, names | failed)
        left = [job for jobs in known for job in jobs if job.name not in names | failed]
        if only is not None:
            left = [job for jobs in known for job in jobs if job.name == only]
            if not left or only in names:
                raise SystemExit(f"{only} has a row already, or no phase that started knows it")
        if not left:
            return
        job = next((job for job in left if _claim(cache, job.name)), None)
        if job is None:
            time.sleep(20)
            continue
        claim = cache / f"{job.name}.claim"
        written = {f"{row['stage']}-{row['arm']}-s{row['seed']}" for row in read(path)}
        if job.name not in written:  # nobody finished it between reading and claiming
            try:
                append(path, train(job, cache))
            except (ArithmeticError, TimeoutError) as error:
                claim.with_suffix(".failed").write_text(str(error))
        torch.compiler.reset()
        claim.unlink()
        if once or only is not None:
            return


def _claim(cache: Path, name: str) -> bool:
    """Take a job, unless a living process has it."""
    claim = cache / f"{name}.claim"
    with _alone(cache):
        if claim.exists() and not Path(f"/proc/{claim.read_text() or None}").exists():
            claim.unlink()
        try:
            handle = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        os.write(handle, str(os.getpid()).encode())
        os.close(handle)
    return True


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """One process at a time looks at claims."""
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read(path: Path) -> list[Row]:
    """The rows written so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: Row) -> None:
    """Add a row by one write, so that two processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    os.write(handle, (json.dumps(row) + "\n").encode())
    os.fsync(handle)
    os.close(handle)


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
    """The job of a stage with the highest top-1 on held-out images; lower loss breaks ties."""
    found = [row for row in rows if row["stage"] == stage]
    if not found:
        return default
    row = max(found, key=lambda row: (row["metrics"]["top1"], -row["metrics"]["loss"]))
    return Job(**{key: row["settings"][key] for key in asdict(default)})


def _complete(jobs: list[Job], finished: set[str]) -> bool:
    return all(job.name in finished for job in jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default="docs/results/binaryvit_imagenette.jsonl")
    parser.add_argument("--cache", type=Path, default="runs/binaryvit_runs")
    parser.add_argument("--job", help="this one only, such as core-asm-s0")
    parser.add_argument("--once", action="store_true", help="end after one job")
    parser.add_argument("--table", action="store_true", help="print the rows and do nothing else")
    given = parser.parse_args()
    if given.table:
        Console().print(table(read(given.rows)))
        return
    torch.set_num_threads(1)
    given.cache.mkdir(parents=True, exist_ok=True)
    work(given.rows, given.cache, given.job, given.once)


if __name__ == "__main__":
    main()

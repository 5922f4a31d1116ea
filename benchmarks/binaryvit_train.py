"""One training run of `binaryvit_runs.py`: a job in, a row of results out."""

import math
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import binaryvit_data as data
import torch
from jobs import Row
from torch import Tensor, nn

import qat
from binaryvit import BinaryQuantizers, asm, grs
from binaryvit.convert import react_
from qat.layers import quantized_weights
from qat.lightning.training import parameter_groups
from qat.plan import Plan
from qat.quantizers import Quantizer, quantizers
from qat.train.losses import Objective
from qat.train.oscillation import Oscillation, sign_statistics
from qat.train.regularize import Regularizer

LIMIT = 75 * 60  # seconds of processor time a run
OBJECTIVE = Objective(hard=0.0, soft=1.0)
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    """One training run."""

    stage: str
    arm: str
    lr: float
    seed: int = 0
    epochs: int = 8
    shift: str = "StaticShift"
    blocks: str = "react"
    form: str | None = None
    strength: float = 0.0
    schedule: str = "cosine_ramp"
    decoupled: bool = False

    @property
    def name(self) -> str:
        """What `--job` takes."""
        return f"{self.stage}-{self.arm}-s{self.seed}"

    def regularizer(self) -> grs.GRS | None:
        """Its GRS."""
        if self.form is None:
            return None
        schedule = getattr(grs, self.schedule)
        return grs.GRS(getattr(grs, self.form)(), self.strength, schedule, self.decoupled)


def train(job: Job, cache: Path) -> Row:
    """Run a job; its row."""
    began = time.process_time()
    pool = data.load(cache / "data.pt")
    held_out = job.stage in ("lr", "grs")
    rows = rows_of(pool, held_out)
    torch.manual_seed(job.seed)
    model = data.float_model()
    model.load_state_dict(pool["teacher"])
    convert = react_ if job.blocks == "react" else qat.convert_
    factory = BinaryQuantizers(shift=getattr(asm, job.shift))
    convert(model, Plan.load(ROOT / "configs/plans/vit_binary.yaml"), factory)
    first = rows[torch.randperm(len(rows))[: 4 * data.BATCH]].split(data.BATCH)
    qat.calibrate(model, [data.normalized(pool["views"][part, 0]) for part in first])
    watch = Watch(list(quantized_weights(model)), job.epochs * steps_of(rows), every=8)
    history: list[dict[str, float]] = []
    for epoch in distil(model, pool, rows, job.lr, job.epochs, job.regularizer(), watch, began):
        history.append(epoch)
        print(job.name, len(history), epoch, flush=True)
    use = activation_use(model, data.normalized(pool["held_images"][: 4 * data.BATCH]))
    top1, loss, images = judged(model, pool, held_out)
    metrics = {"top1": top1, "loss": loss, "images": images, **use}
    metrics |= {key: [epoch[key] for epoch in history] for key in history[0]}
    metrics["cpu_seconds_in_all"] = time.process_time() - began
    command = f"python benchmarks/binaryvit_runs.py --job {job.name}"
    return row_of(job, pool, held_out, command, metrics)


def rows_of(pool: dict[str, Any], held_out: bool) -> Tensor:
    """Indices of the training images, without a tenth of them where that is held out."""
    rows = torch.arange(len(pool["labels"]))
    return rows[~torch.isin(rows, pool["held"])] if held_out else rows


def steps_of(rows: Tensor) -> int:
    """Whole batches in an epoch."""
    return len(rows) // data.BATCH


def distil(
    model: nn.Module,
    pool: dict[str, Any],
    rows: Tensor,
    lr: float,
    epochs: int,
    regularizer: Regularizer | None,
    watch: "Watch",
    began: float,
) -> Iterator[dict[str, float]]:
    """Train on the teacher's soft labels; what each epoch was like, after it.

    Raises:
        ArithmeticError: If the loss is not finite.
        TimeoutError: If the run has taken more than `LIMIT` of processor time since `began`.
    """
    model.train()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=lr, weight_decay=0.0, fused=True)
    steps = steps_of(rows)
    total, done = epochs * steps, 0
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    for _ in range(epochs):
        start, losses = time.process_time(), []
        order = rows[torch.randperm(len(rows))]
        drawn = torch.randint(data.VIEWS, (len(rows),))
        for step in range(steps):
            part = slice(step * data.BATCH, (step + 1) * data.BATCH)
            chosen = order[part], drawn[part]
            with data.autocast():
                logits = compiled(data.normalized(pool["views"][chosen]))
            labels = pool["labels"][chosen[0]]
            loss = OBJECTIVE.terms(logits, labels, pool["logits"][chosen])["loss"]
            optimizer.zero_grad()
            loss.backward()
            if regularizer is not None:
                regularizer.adjust_gradients(model, done / total)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if regularizer is not None:
                regularizer.adjust_weights(model, float(schedule.get_last_lr()[0]), done / total)
            schedule.step()
            done += 1
            watch.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ArithmeticError(f"the loss of step {done} is {losses[-1]}")
            if time.process_time() - began > LIMIT:
                raise TimeoutError(f"{done} of {total} steps in {LIMIT} s of processor time")
        seconds = time.process_time() - start
        speed = {"cpu_seconds": seconds, "images_per_second": steps * data.BATCH / seconds}
        yield {"train_loss": statistics.fmean(losses), **watch.epoch(), **speed}
        model.train()


def judged(model: nn.Module, pool: dict[str, Any], held_out: bool) -> tuple[float, float, int]:
    """Top-1 and loss, on how many images."""
    images = pool["held_images" if held_out else "val_images"]
    labels = pool["labels"][pool["held"]] if held_out else pool["val_labels"]
    return *data.evaluate(model, images, labels), len(labels)


def row_of(
    job: Any, pool: dict[str, Any], held_out: bool, command: str, metrics: dict[str, Any]
) -> Row:
    """The row of a job, with all it takes to run it again."""
    return {
        "stage": job.stage,
        "arm": job.arm,
        "seed": job.seed,
        "settings": asdict(job) | {"batch": data.BATCH, "bf16": data.BF16},
        "evaluated_on": "held-out tenth of train" if held_out else "val",
        "teacher_top1": pool["teacher_top1"],
        "command": command,
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "machine": machine(),
        "metrics": metrics,
    }


class Watch:
    """Codes of some weights, step by step.

    Args:
        weights: Layers, from `quantized_weights`.
        total: Steps of the training.
        every: Look at every so many rows; above 1 only where scales follow from the row.
    """

    def __init__(
        self, weights: list[tuple[str, nn.Parameter, Quantizer]], total: int, every: int = 1
    ) -> None:
        self.weights = [(weight, quantizer) for _, weight, quantizer in weights]
        self.rows = slice(None, None, every)
        self.seen = [Oscillation(codes) for codes in self._codes()]
        self.before, self.total, self.done = self._codes(), total, 0

    def step(self) -> None:
        """After a step; oscillations count after the first tenth of training."""
        self.done += 1
        for seen, codes in zip(self.seen, self._codes(), strict=True):
            seen.update(codes, count_oscillations=self.done > 0.1 * self.total)

    def epoch(self) -> dict[str, float]:
        """Shares of the weights, since the last call."""
        flips = [seen.take_flips() for seen in self.seen]
        now = [seen.previous.clone() for seen in self.seen]
        changed = [a != b for a, b in zip(now, self.before, strict=True)]
        self.before = now
        near = [quantizer.boundary_distance(w[self.rows]) < 0.1 for w, quantizer in self.weights]
        return {
            "flip_rate": sum(a for a, _ in flips) / sum(b for _, b in flips),
            "changed_in_epoch": _share(changed),
            "changed_in_all": _share([seen.changed() for seen in self.seen]),
            "oscillating": _share([seen.oscillating() for seen in self.seen]),
            "near_boundary": _share(near),
        }

    def _codes(self) -> list[Tensor]:
        return [quantizer.codes(weight[self.rows]).values for weight, quantizer in self.weights]


def activation_use(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Sign entropy and dead channels of binary activations, mean over their quantizers."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def hook(quantizer: Any, _: Any, output: Tensor) -> None:
        pairs.append(sign_statistics(output, quantizer.shape))

    found = [q for _, q in quantizers(model) if q.operand not in ("weight", "attention")]
    hooks = [quantizer.register_forward_hook(hook) for quantizer in found]
    model.eval()
    with torch.no_grad():
        model(images)
    for handle in hooks:
        handle.remove()
    entropy, dead = (torch.stack(column).mean() for column in zip(*pairs, strict=True))
    return {"sign_entropy": float(entropy), "dead_channels": float(dead)}


def machine() -> dict[str, Any]:
    """Processor and torch."""
    text = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    words = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    words = {key.strip(): value.strip() for key, value in words.items()}
    flags = words.get("flags", "").split()
    present = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    cpu = words.get("model name", platform.processor())
    return {"cpu": cpu, "torch": torch.__version__, "flags": present}


def _share(flags: list[Tensor]) -> float:
    return sum(int(part.sum()) for part in flags) / sum(part.numel() for part in flags)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

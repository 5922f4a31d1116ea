"""One training run of `starts.py`: a job in, a row of results out."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import binaryvit_data as data
import torch
from binaryvit_train import ROOT, Watch, distil, judged, row_of, rows_of, steps_of
from jobs import Row
from starts_cures import CURES
from torch import Tensor, nn

import qat
from binaryvit import BinaryQuantizers
from binaryvit.convert import react_
from ptq_init.mgrq import MGRQ
from ptq_init.minmax import MinMaxRange, calibrate_by
from ptq_init.percentile_mse import PercentileMSERange
from ptq_init.repq_vit import RepQViT
from qat.cost.count import cost
from qat.layers import quantized_weights
from qat.plan import Plan
from qat.quantizers import LSQ, Affine, PercentileMSE
from qat.quantizers.percentile_mse import OFFICIAL
from qat.search import pmq
from qat.search.allocate import best
from qat.search.metrics import TokenFisher
from qat.search.probe import probing
from qat.search.sensitivity import monotone
from qat.spec import QuantSpec

EPOCHS, IMAGES, CALIBRATION = 5, 5000, 256
TRAINED_SCALES = partial(Affine, learn_scale=True)
WIDE = partial(PercentileMSE, fractions=OFFICIAL)
SIGNED = {"lsq": LSQ, "lsq_mse": partial(LSQ, observer=WIDE)}
"""Starts with LSQ's grids, and the quantizer of each."""
START: dict[str, Callable[[nn.Module, Iterable[Tensor]], None]] = {
    "lsq": qat.calibrate,
    "lsq_mse": qat.calibrate,
    "narrow": PercentileMSERange(),
    "minmax": MinMaxRange(),
    "mse": lambda model, batches: calibrate_by(model, batches, WIDE),
    "repq": RepQViT(),
    "mgrq": MGRQ(),
}


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        bits: `w4a4`, `w2a2`, `pmq` or `binary`.
        start: What sets the quantizers, and perhaps the weights, before training.
        cure: Cure for oscillation.
        strength: Of the cure.
    """

    stage: str
    arm: str
    bits: str
    start: str
    lr: float
    seed: int = 0
    cure: str | None = None
    strength: float = 0.0

    @property
    def name(self) -> str:
        """What `--job` takes."""
        return f"{self.stage}-{self.arm}-s{self.seed}"


def train(job: Job, cache: Path) -> Row:
    """Run a job; its row. `top1` and `loss` are lists over epochs 0, 1 and the last."""
    began = time.process_time()
    pool = data.load(cache / "data.pt")
    held_out = job.stage in ("lr", "strength")
    rows = rows_of(pool, held_out)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:IMAGES]
    rows = rows[chosen.sort().values]
    torch.manual_seed(job.seed)
    drawn = rows[torch.randperm(len(rows))[:CALIBRATION]]
    images = data.normalized(pool["views"][drawn, 0])
    model = _started(job, pool, images, cache)
    found = [judged(model, pool, held_out)]
    start_seconds = time.process_time() - began
    cure = None if job.cure is None else CURES[job.cure](job.strength)
    watch = Watch(list(quantized_weights(model))[::5], EPOCHS * steps_of(rows))
    history = []
    for epoch in distil(model, pool, rows, job.lr, EPOCHS, cure, watch, began):
        history.append(epoch)
        if len(history) in (1, EPOCHS):
            found.append(judged(model, pool, held_out))
        print(job.name, len(history), found[-1], epoch, flush=True)
    top1, loss, counts = zip(*found, strict=True)
    costs = cost(model)
    bits = pmq.mean_bits(costs)
    metrics: dict[str, Any] = {
        "epochs": [0, 1, EPOCHS],
        "top1": top1,
        "loss": loss,
        "images": counts[0],
        "mean_bits_weight": bits[0],
        "mean_bits_activation": bits[1],
        "bops": sum(site.bops for site in costs.sites),
        "scales_not_positive": _share_not_positive(model),
        "cpu_seconds_start": start_seconds,
    }
    metrics |= {f"{key}_by_epoch": [epoch[key] for epoch in history] for key in history[0]}
    metrics["cpu_seconds_in_all"] = time.process_time() - began
    command = f"python benchmarks/starts.py --job {job.name}"
    return row_of(job, pool, held_out, command, metrics)


def plan_of(bits: str, cache: Path, zero_point: bool = True) -> Plan:
    """The plan of a width; with signed grids where the quantizers have no zero point."""
    if bits == "pmq":
        return Plan.load(cache / "pmq.yaml")
    edges8 = ROOT / "configs/plans/edges8_w2a2.yaml"
    plan = Plan.load(edges8) if bits == "w2a2" else Plan.uniform(int(bits[1]), int(bits[3]))
    return plan if zero_point else Plan(tuple(_signed(rule) for rule in plan.rules))


def _started(job: Job, pool: dict[str, Any], images: Tensor, cache: Path) -> nn.Module:
    """The model where training begins."""
    if job.bits == "binary":
        return _binary(job.start, pool, images)
    if job.bits == "pmq" and not (cache / "pmq.yaml").exists():
        _search(pool, images).save(cache / "pmq.yaml")
    factory = SIGNED.get(job.start, TRAINED_SCALES)
    plan = plan_of(job.bits, cache, zero_point=job.start not in SIGNED)
    return _converted(plan, factory, START[job.start], pool, images)


def _converted(plan: Plan, factory: Any, start: Any, pool: Any, images: Tensor) -> nn.Module:
    model = _teacher(pool)
    qat.convert_(model, plan, factory)
    start(model, [images])
    return model


def _binary(start: str, pool: dict[str, Any], images: Tensor) -> nn.Module:
    """Binary `react` from the teacher's weights, or from those that RepQ-ViT makes at W4A4."""
    model = _teacher(pool)
    if start == "repq":
        moved = _converted(Plan.uniform(4, 4), Affine, RepQViT(), pool, images).state_dict()
        model.load_state_dict({name: moved[name] for name in model.state_dict()})
    react_(model, Plan.load(ROOT / "configs/plans/vit_binary.yaml"), BinaryQuantizers())
    qat.calibrate(model, images.split(data.BATCH))
    return model


def _search(pool: dict[str, Any], images: Tensor) -> Plan:
    """The plan of PMQ at the operations of W4A4, as `configs/pmq/imagenet_vit_tiny.yaml` has it."""
    model, like = _teacher(pool), _teacher(pool)
    qat.convert_(model, Plan.uniform(8, 8), TRAINED_SCALES)
    qat.convert_(like, Plan.uniform(4, 4), TRAINED_SCALES)
    space = pmq.Space(activations=(4, 5, 6, 7, 8))
    widths, costs, price = pmq.slots(model, space), cost(model), pmq.cost_of("bops", None)
    RepQViT(per_token=True)(model, [images])
    with probing(model, images[:8], widths, partial(PercentileMSE, per_token=True)) as probes:
        omega = monotone(TokenFisher()(model, probes, images, None))
    task = pmq.problem(costs, omega, space, "bops", price)
    picks = best(task.components, pmq.cost_under("bops", price, like) - task.constant, 0)
    return pmq.plan_of(model, pmq.chosen_bits(task.components, picks, omega), {})


def _teacher(pool: dict[str, Any]) -> nn.Module:
    model = data.float_model()
    model.load_state_dict(pool["teacher"])
    return model.eval()


def _signed(rule: Any) -> Any:
    specs = {f.name: getattr(rule, f.name) for f in fields(rule) if f.name != "attention"}
    found = {name: spec for name, spec in specs.items() if isinstance(spec, QuantSpec)}
    return replace(rule, **{name: replace(spec, signed=True) for name, spec in found.items()})


def _share_not_positive(model: nn.Module) -> float:
    scales = [
        p.detach().flatten() for name, p in model.named_parameters() if name.endswith("scale")
    ]
    return float((torch.cat(scales) <= 0).float().mean()) if scales else 0.0

"""What must hold for any model: each check takes a subject, and raises where something does not.

Weights are random, all operands are on 8 bits, and two images of noise are enough. Checks do not
change the subject, but for the first, which converts it; so each stands alone.
"""

import copy
import random
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from audit import audit, coverage
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import qat
from ptq_init.mgrq import MGRQ
from ptq_init.percentile_mse import PercentileMSERange
from ptq_init.repq_vit import RepQViT
from qat import Phase, set_phase
from qat.calibrate import Initialiser
from qat.card import expected_by
from qat.cost.count import cost
from qat.plan import load_plan
from qat.quantizers import Affine

ROOT, DROPOUT = str(Path(__file__).parents[1]), 0.1
INITIALISERS: dict[str, Initialiser] = {
    "percentile_mse": PercentileMSERange(),
    "repq_vit": RepQViT(),
    "mgrq": MGRQ(num_steps=2, num_init=2, batch_size=2),
}


class DiffersError(Exception):
    """What should be equal is not."""


@dataclass
class Subject:
    """A model as it was, as it is after conversion, and images for both."""

    original: nn.Module
    model: nn.Module
    images: Tensor

    @staticmethod
    def of(original: nn.Module) -> "Subject":
        """A model, not yet converted, whose dropout has something to drop."""
        for module in original.modules():
            if (
                isinstance(module, nn.Dropout) and not module.inplace
            ):  # that of TNT breaks gradients
                module.p = DROPOUT
        seed()
        images = torch.randn(2, *expected_by(original).input_size)
        return Subject(original.eval(), copy.deepcopy(original), images)

    @cached_property
    def calibrated(self) -> nn.Module:
        """The converted model, calibrated; not to be changed."""
        model = copy.deepcopy(self.model)
        qat.calibrate(model, [self.images])
        return model

    def quantized(self) -> nn.Module:
        """A copy of it."""
        return copy.deepcopy(self.calibrated)


def converts(subject: Subject) -> None:
    """The model converts, in place."""
    qat.convert_(subject.model, load_plan("w8a8"), Affine)


def same_float(subject: Subject) -> None:
    """Phase FLOAT computes the same bits, in evaluation mode."""
    require_same(run(subject.original, subject.images), run(subject.model, subject.images))


def same_float_train(subject: Subject) -> None:
    """Likewise in training mode, from the same seed."""
    models = [copy.deepcopy(model).train() for model in (subject.original, subject.model)]
    require_same(*(run(model, subject.images) for model in models))


def macs(subject: Subject) -> None:
    """MACs are half of the FLOPs that torch counts, before and after conversion."""
    # With gradients, without which torch's attention has a fast path that is not counted.
    model, counter = copy.deepcopy(subject.original), FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(subject.images[:1])
    counts = [cost(model).macs for model in (subject.original, subject.model)]
    if any(2 * count != counter.get_total_flops() for count in counts):
        raise DiffersError(f"{counter.get_total_flops() / 2:g} by torch, {counts} before and after")


def covered(subject: Subject) -> None:
    """Coverage is that of the audit, which also finds as many MACs."""
    model = copy.deepcopy(subject.model)
    set_phase(model, Phase.QUANTIZE)
    found, ours = audit(model, subject.images[:1]), cost(model)
    audited = sum(product.macs for product in found), coverage(found)
    if audited[0] != ours.macs or abs(audited[1] - ours.coverage_macs) > 1e-9:
        raise DiffersError(f"{audited} by the audit, {(ours.macs, ours.coverage_macs)} by us")


def calibrates(subject: Subject) -> None:
    """After calibration the output is finite."""
    if not all(x.isfinite().all() for x in run(subject.calibrated, subject.images)):
        raise DiffersError("the output is not finite")


def saves(subject: Subject) -> None:
    """A file gives the same bits."""
    model = subject.calibrated
    with tempfile.TemporaryDirectory() as folder:
        qat.save(model, Path(folder) / "model.ckpt")
        loaded = qat.load(Path(folder) / "model.ckpt")
    require_same(run(model, subject.images), run(loaded, subject.images))


def gradients(subject: Subject) -> None:
    """What gets a gradient in float gets one quantized."""
    reached = []
    for model in (copy.deepcopy(subject.original), subject.quantized()):
        backward(model.train(), subject.images)
        reached.append({k for k, p in model.named_parameters() if p.grad is not None})
    if lost := reached[0] - reached[1]:
        raise DiffersError(f"{len(lost)} lose their gradient, such as {sorted(lost)[:3]}")


def initialises(initialiser: Initialiser) -> Callable[[Subject], None]:
    """The initialiser works; if it refuses, the model computes what it did."""

    def check(subject: Subject) -> None:
        model = copy.deepcopy(subject.model)
        try:
            initialiser(model, [subject.images])
        except Exception:
            set_phase(model, Phase.FLOAT)
            same_float(Subject(subject.original, model, subject.images))
            raise
        if not all(x.isfinite().all() for x in run(model, subject.images)):
            raise DiffersError("the output is not finite")

    return check


def compile_float(subject: Subject) -> None:
    """Phase FLOAT compiles as one graph."""
    require_same(run(subject.model, subject.images), run(compiled(subject.model), subject.images))


def compile_quantize(subject: Subject) -> None:
    """Phase QUANTIZE compiles as one graph."""
    model = subject.quantized()
    require_same(run(model, subject.images), run(compiled(model), subject.images))


def compile_train(subject: Subject) -> None:
    """A training step compiles as one graph; without dropout, whose draws may differ."""
    models = [subject.quantized().train() for _ in range(2)]
    for module in (m for model in models for m in model.modules() if isinstance(m, nn.Dropout)):
        module.p = 0.0
    eager, other = models
    require_same(backward(eager, subject.images), backward(compiled(other), subject.images))
    for (name, ours), theirs in zip(eager.named_parameters(), other.parameters(), strict=True):
        if ours.grad is not None and (theirs.grad is None or not ours.grad.equal(theirs.grad)):
            raise DiffersError(f"the gradient of {name}")


CHECKS: dict[str, Callable[[Subject], None]] = {
    "converts": converts,
    "float": same_float,
    "float_train": same_float_train,
    "macs": macs,
    "coverage": covered,
    "calibrates": calibrates,
    "saves": saves,
    "gradients": gradients,
}
INITIALISING = {name: initialises(initialiser) for name, initialiser in INITIALISERS.items()}
COMPILING = {f.__name__: f for f in (compile_float, compile_quantize, compile_train)}


def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from tensors(value)


@torch.no_grad()
def run(model: Callable[[Tensor], Any], images: Tensor) -> list[Tensor]:
    seed()
    return list(tensors(model(images)))


def backward(model: Callable[[Tensor], Any], images: Tensor) -> list[Tensor]:
    """Outputs, after a backward pass from their sum."""
    seed()
    outputs = list(tensors(model(images)))
    torch.stack([x.sum() for x in outputs if x.requires_grad]).sum().backward()
    return outputs


def compiled(model: nn.Module) -> Callable[[Tensor], Any]:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


def require_same(left: list[Tensor], right: list[Tensor]) -> None:
    """Refuse outputs that differ in a bit."""
    if len(left) != len(right):
        raise DiffersError(f"{len(left)} outputs and {len(right)}")
    for ours, theirs in zip(left, right, strict=True):
        if not torch.equal(ours, theirs):
            raise DiffersError(f"outputs by up to {(ours - theirs).abs().max():.3g}")


def outcome(check: Callable[[], object]) -> bool | str:
    """True, or why not: what differs, an error of ours that says what to do, or a raw one."""
    try:
        check()
    except DiffersError as error:
        return f"differs: {error}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        stated = last.filename.startswith(ROOT) and str(last.line).startswith("raise ")
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if stated and isinstance(error, ValueError | RuntimeError):
            return f"ours: {text}"
        return f"raw: {text} ({Path(last.filename).name}:{last.lineno})"
    return True

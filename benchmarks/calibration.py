"""Seconds of RepQ-ViT's calibration: all scales searched at once, against a loop over channels.

    python benchmarks/calibration.py --rounds 3

Both forms calibrate the same deit_tiny (W4A4, random weights, 32 images) in the same pipeline, in
turn; they differ in the search of uniform ranges alone. The looped form is that of the official
code: for each channel and each percentile, two full sorts and a pass over the values. A forward
pass of the float model on the same images is the unit. Seconds are those of the processor.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from ptq_init.repq_vit import calibrate_channels, mean_grid, reparametrize_norms
from qat import Plan, convert_
from qat.models import timm_model
from qat.quantizers import LogSqrt2, ObserverFactory, PercentileMSE, PerOperand
from qat.quantizers.observers import Observer, scale_of_range, squared_errors


class LoopedPercentileMSE(Observer):
    """The same search, one channel and one candidate after the other."""

    contains_zero = False

    def update(self, groups: Tensor) -> None:
        """Search each row alone."""
        found = [self._search(row) for row in groups]
        self.lower = torch.stack([lower for lower, _ in found])
        self.upper = torch.stack([upper for _, upper in found])

    def bounds(self) -> tuple[Tensor, Tensor]:
        """What the search found."""
        return self.lower, self.upper

    def _search(self, row: Tensor) -> tuple[Tensor, Tensor]:
        best, chosen = None, (row[0], row[0])
        for fraction in (0.999, 0.9999, 0.99999):
            upper, lower = row.quantile(fraction), row.quantile(1 - fraction)
            grid = scale_of_range(lower[None], upper[None], self.spec, contains_zero=False)
            error = squared_errors(row[None], *grid, self.spec).mean()
            if best is None or error < best:
                best, chosen = error, (lower, upper)
        return chosen


def calibrate(observer: ObserverFactory, images: Tensor) -> float:
    """Seconds of a calibration from scratch."""
    torch.manual_seed(0)
    model = timm_model("deit_tiny_patch16_224").eval()
    convert_(model, Plan.uniform(4, 4), PerOperand(attention=LogSqrt2))
    started = time.process_time()
    pairs = calibrate_channels(model, images, observer)
    reparametrize_norms(model, images, pairs, mean_grid, observer)
    return time.process_time() - started


@torch.no_grad()
def forward(images: Tensor) -> float:
    """Seconds of a forward pass in float."""
    model = timm_model("deit_tiny_patch16_224").eval()
    model(images[:2])
    started = time.process_time()
    model(images)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num_threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    images = torch.randn(32, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {"float forward": [], "looped": [], "at once": []}
    for _ in range(arguments.rounds):
        times["float forward"].append(forward(images))
        times["looped"].append(calibrate(LoopedPercentileMSE, images))
        times["at once"].append(calibrate(PercentileMSE, images))
    for name, seconds in times.items():
        print(f"{name:14} {statistics.median(seconds):7.2f} s {_spread(seconds)}")
    for name, unit in (("at once", "float forward"), ("looped", "at once")):
        ratios = [part / whole for part, whole in zip(times[name], times[unit], strict=True)]
        print(f"{name} / {unit}: {statistics.median(ratios):.1f} {_spread(ratios)}")


def _spread(values: list[float]) -> str:
    return f"[{min(values):.2f}, {max(values):.2f}]"


if __name__ == "__main__":
    main()

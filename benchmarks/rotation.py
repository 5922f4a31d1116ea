"""Where rotations and twin logs help: layers with salient channels, and the threshold of ARS.

    python benchmarks/rotation.py salient
    python benchmarks/rotation.py threshold WEIGHTS IMAGES LABELS  # the MNIST DiT of the assets
    python benchmarks/rotation.py weights WEIGHTS IMAGES LABELS

`salient` quantizes one linear layer whose input has two channels that are huge in every token, and
prints the energy of the mild part of its output over that of the error, in decibels. `threshold`
prints the fluctuation of every layer, and the distance of noise predictions to those of the float
model for thresholds between none and all layers above. `weights` prints how well weights and layer
outputs survive weight quantization alone, in decibels, means over layers.
"""

import argparse
import copy
from functools import partial
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor, nn

import qat
from ptq_init.lrq_dit import (
    AdaptiveRotation,
    DualRotation,
    HadamardRotation,
    InputStatistics,
    LRQDiT,
    Rotate,
    input_statistics,
)
from qat.data.idx import idx
from qat.diffusion import NoiseSchedule
from qat.diffusion.build import mnist_dit
from qat.layers import QuantLinear
from qat.quantizers import MSE, Affine, DynamicToken, PerOperand, QuantizerFactory, TwinLog

CLIPPED = partial(Affine, observer=MSE)
METHODS: dict[str, tuple[QuantizerFactory, Rotate | None, bool]] = {
    "RTN": (Affine, None, False),
    "clipped": (CLIPPED, None, False),
    "SmoothQuant": (Affine, None, True),
    "Hadamard": (Affine, HadamardRotation(), False),
    "dual": (Affine, DualRotation(), False),
    "TLQ": (TwinLog, None, False),
    "ARS": (Affine, AdaptiveRotation(), False),
    "LRQ-DiT": (TwinLog, AdaptiveRotation(), False),
    "LRQ-DiT, smoothed": (TwinLog, AdaptiveRotation(), True),
    "LRQ-DiT, code mode, smoothed": (partial(TwinLog, mode="code"), AdaptiveRotation(), True),
    "Hadamard, smoothed": (Affine, HadamardRotation(), True),
    "dual, smoothed": (Affine, DualRotation(), True),
    "Hadamard + TLQ, smoothed": (TwinLog, HadamardRotation(), True),
    "Hadamard + TLQ": (TwinLog, HadamardRotation(), False),
    "Hadamard + clipped": (CLIPPED, HadamardRotation(), False),
}
SEEDS = (0, 1, 2)


def plan(pattern: str, weight: int, activation: int) -> qat.Plan:
    """One width for weights, one for inputs."""
    spec = {"bits": weight, "signed": False, "granularity": "per_channel"}
    skip = [{"pattern": "*modulation*", "reason": "float"}] if pattern != "0" else []
    return qat.Plan.from_list(
        [*skip, {"pattern": pattern, "weight": spec, "input": {"bits": activation}}]
    )


def salient() -> None:
    """Print the table of the synthetic layer."""
    print("| weights | bits | " + " | ".join(METHODS) + " |")
    for tails in ("Gauss", "Student t4"):
        for bits in ((4, 8), (4, 4), (3, 4)):
            cells = []
            for factory, rotate, smooth in METHODS.values():
                found = [decibels(tails, bits, factory, rotate, smooth, seed) for seed in SEEDS]
                cells.append(f"{mean(found):.1f} ± {stdev(found):.1f}")
            print(f"| {tails} | W{bits[0]}A{bits[1]} | " + " | ".join(cells) + " |", flush=True)


def decibels(
    tails: str,
    bits: tuple[int, int],
    factory: QuantizerFactory,
    rotate: Rotate | None,
    smooth: bool,
    seed: int,
) -> float:
    """Energy of the mild part of the output over that of the error of one quantized layer."""
    torch.manual_seed(seed)
    mild = 0.5 * torch.randn(512, 1152)
    x = mild.clone()
    x[:, 100] += 60
    x[:, 700] -= 120
    linear = nn.Linear(1152, 256, bias=False)
    layer = nn.Sequential(linear)
    draw = torch.randn if tails == "Gauss" else torch.distributions.StudentT(4.0).sample
    with torch.no_grad():
        linear.weight.copy_(0.03 * draw((256, 1152)))
        exact, signal = layer(x), layer(mild)
        quantizer = PerOperand(weight=factory, input=DynamicToken)
        qat.convert_(layer, plan("0", *bits), quantizer)
        LRQDiT(rotate, smooth)(layer, [x[:256]])
        noise = (layer(x) - exact)[256:]
    return float(10 * torch.log10(signal[256:].square().mean() / noise.square().mean()))


def threshold(weights: str, images: str, labels: str) -> None:
    """Print fluctuations, and the distance to float at several thresholds."""
    original, schedule = mnist_dit(weights), NoiseSchedule()
    gaps: dict[tuple[str, float], list[float]] = {}
    for seed in SEEDS:
        batches = [
            noisy(images, labels, split, schedule, count, seed)
            for split, count in (("train", 256), ("test", 256))
        ]
        with torch.no_grad():
            exact = original(*batches[1])
        for bits in ((4, 4), (3, 4)):
            for level in (0.0, 0.3, 0.5, 0.7, 1.0, 2.0):
                model = copy.deepcopy(original)
                quantizer = PerOperand(weight=TwinLog, input=DynamicToken)
                qat.convert_(model, plan("blocks.*", *bits), quantizer)
                if not gaps:
                    for name, (_, found) in input_statistics(model, batches[0]).items():
                        print(f"{name}: J {found.fluctuation:.3f}, max {found.largest.max():.1f}")
                torch.manual_seed(seed)
                LRQDiT(AdaptiveRotation(threshold=level), smooth=False)(model, [batches[0]])
                with torch.no_grad():
                    gap = (model(*batches[1]) - exact).square().mean()
                gaps.setdefault((f"W{bits[0]}A{bits[1]}", level), []).append(float(gap))
    for (bits_name, level), found in gaps.items():
        print(f"{bits_name} threshold {level}: gap {mean(found):.5f} ± {stdev(found):.5f}")


def weights(file: str, images: str, labels: str) -> None:
    """Print the signal-to-noise ratio of weights and of what layers make of their inputs."""
    factories = {
        "uniform": Affine,
        "clipped": CLIPPED,
        **{f"TLQ {mode}": partial(TwinLog, mode=mode) for mode in ("clean", "code", "paper")},
    }
    batch = noisy(images, labels, "train", NoiseSchedule(), 256, 0)
    for rotate in (None, HadamardRotation()):
        for bits in (4, 3):
            for name, factory in factories.items():
                model = mnist_dit(file)
                quantizer = PerOperand(weight=factory, input=DynamicToken)
                qat.convert_(model, plan("blocks.*", bits, 8), quantizer)
                torch.manual_seed(0)
                LRQDiT(rotate, smooth=False)(model, [batch])
                found = [_ratios(*pair) for pair in input_statistics(model, batch).values()]
                of_weights, of_outputs = (mean(ratios) for ratios in zip(*found, strict=True))
                kind = "none" if rotate is None else "Hadamard"
                print(f"| {kind} | {bits} | {name} | {of_weights:.2f} | {of_outputs:.2f} |")


@torch.no_grad()
def _ratios(layer: QuantLinear, statistics: InputStatistics) -> tuple[float, float]:
    x, weight = statistics.tokens, layer.weight
    assert layer.weight_quantizer is not None
    x = x if layer.input_transform is None else layer.input_transform(x)
    noise = layer.weight_quantizer(weight) - weight
    pairs = ((weight, noise), (x @ weight.T, x @ noise.T))
    weights, outputs = (
        float(10 * torch.log10(signal.square().sum() / error.square().sum()))
        for signal, error in pairs
    )
    return weights, outputs


def noisy(
    images: str, labels: str, split: str, schedule: NoiseSchedule, count: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy digits at time steps spread evenly."""
    source = idx(images, labels, split=split)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randperm(len(source), generator=generator)[:count].tolist()
    pixels = torch.stack([torch.from_numpy(np.array(source[i][0]))[None] for i in draw])
    times = schedule.spread(count)[torch.randperm(count, generator=generator)]
    noise = torch.randn(pixels.shape, generator=generator)
    clean = pixels / 127.5 - 1
    return (
        schedule.add_noise(clean, noise, times),
        times,
        torch.tensor([source[i][1] for i in draw]),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["salient", "threshold", "weights"])
    parser.add_argument("files", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"salient": salient, "threshold": threshold, "weights": weights}[arguments.what](
        *arguments.files
    )

"""Speed of packed binary models beside float and int8 engines, one thread.

    python benchmarks/inference.py --models deit_small_patch16_224 --batches 1 8 --rounds 15

Processor time of the process, engines interleaved round by round, so that other load on the machine
hardly matters. A ratio is the median over rounds of (engine / ours in the same round), with the
smallest and the largest. Weights and images are random: nothing here is about accuracy. The share
of the limit compares binary operations with what the processor does in registers in the same run.
Peers that are not installed are said to be absent. All of them, and we, get a memory allocator that
keeps what it has, or large outputs would be timed as page faults. "medium" is true float32 only on
processors without AMX; OpenVINO's float32 is told not to use bfloat16, its int8 not either.
"""

import argparse
import ctypes
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before anything starts threads of its own

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import qat
from binaryvit import BinaryQuantizers
from binaryvit.asm import DynamicShift
from binaryvit.convert import react_
from qat import kernels, runtime
from qat.export.pack import export_packed
from qat.kernels import loader
from qat.plan import Plan

Run = Callable[[], Any]
SHAPES = ((384, 1152), (384, 384), (384, 1536), (1536, 384))
TOKENS = 197
OURS, REACT = "ours", "ours, react with A2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["deit_small_patch16_224"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rows", type=Path, help="add a line of JSON for each engine to this file")
    parser.add_argument("--skip_linears", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _keep_memory()
    console = Console(width=150)
    console.print(f"torch {torch.__version__}, instruction set {kernels.instruction_set()}")
    if not arguments.skip_linears:
        linears(console, arguments.rounds)
    for name in arguments.models:
        for batch in arguments.batches:
            engines, sizes, absent = whole(name, batch)
            times = timed(engines, arguments.rounds)
            console.print(report(f"{name}, batch {batch}", times), *absent, sep="\n")
            if arguments.rows is not None:
                keep(arguments.rows, name, batch, times, sizes)


def linears(console: Console, rounds: int) -> None:
    """Binary layers from float to float at the shapes of a DeiT-S."""
    for k, n in SHAPES:
        x, layer = torch.randn(TOKENS, k), nn.Linear(k, n)
        engines, absent = linear_engines(x, layer)
        times = timed(engines, 3 * rounds, repeats=10)
        best = min(times[OURS])
        share = 2 * TOKENS * k * n / best / limit()
        table = report(f"linear {k} -> {n}, {TOKENS} tokens", times, unit=1e6, name="us")
        console.print(table, *absent, f"ours at {share:.2f} of the popcount limit", sep="\n")


def linear_engines(x: torch.Tensor, layer: nn.Linear) -> tuple[dict[str, Run], list[str]]:
    """A layer by each engine."""
    k, n = layer.in_features, layer.out_features
    eight = torch.randint(-127, 127, (TOKENS, k), dtype=torch.int8)
    weight = torch.randint(-127, 127, (k, n), dtype=torch.int8)
    run = {**runtime.REFERENCE, **kernels.operations()}
    bits = run["sign_pack"](layer.weight.detach().numpy()[None], np.zeros((1, k), np.float32))[0]
    prepared, ones = run["prepare_binary"](bits, k), np.ones(n, np.float32)
    values, threshold = x.numpy()[None], np.zeros((1, k), np.float32)

    def ours() -> None:
        run["binary_linear"](run["sign_pack"](values, threshold)[0], prepared, k, ones, ones)

    engines: dict[str, Run] = {
        OURS: ours,
        "torch float32": _at("highest", lambda: layer(x)),
        "torch medium": _at("medium", lambda: layer(x)),
        "torch int8 (_int_mm)": lambda: torch.ops.aten._int_mm(eight, weight),
    }
    try:
        bnn = import_module("bnn.wrap")
        peer = bnn.PackedBinaryXNORLinear(layer.weight, layer.bias)
        engines["bnn-lab"] = lambda: peer(x)
    except ImportError as error:
        return engines, [f"bnn-lab is absent ({error})"]
    return engines, []


def whole(name: str, batch: int) -> tuple[dict[str, Run], dict[str, int], list[str]]:
    """A model by each engine, the bytes of its files, and a line for each engine that is absent."""
    images = torch.randn(batch, 3, 224, 224)
    model = qat.timm_model(name).eval()
    plain, plain_bytes = _packed(name, images)
    react, react_bytes = _packed(name, images, DynamicShift, react_)
    float_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    sizes = {OURS: plain_bytes, REACT: react_bytes, "torch float32": float_bytes}
    engines: dict[str, Run] = {
        OURS: plain,
        REACT: react,
        "torch float32": _at("highest", lambda: model(images)),
        "torch medium": _at("medium", lambda: model(images)),
    }
    absent = []
    with tempfile.TemporaryDirectory() as folder:
        for label, make in (("ONNX Runtime", _onnx_runtime), ("OpenVINO", _openvino)):
            try:
                engines |= make(model, images, Path(folder))
            except ImportError as error:
                absent.append(f"{label} is absent ({error})")
    return engines, sizes, absent


def _packed(
    name: str,
    images: torch.Tensor,
    shift: Any = None,
    convert: Callable[..., Any] = qat.convert_,
) -> tuple[Run, int]:
    model = qat.timm_model(name)
    factory = BinaryQuantizers(shift=shift) if shift else BinaryQuantizers()
    convert(model, Plan.load("configs/plans/vit_binary.yaml"), factory)
    qat.calibrate(model, [images[:1]])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.lowbit"
        export_packed(model.eval(), path)
        packed, size = runtime.load(path), path.stat().st_size
    values = images.numpy()
    return lambda: packed(values), size


def _onnx(model: nn.Module, images: torch.Tensor, folder: Path) -> Path:
    import_module("onnx")
    path = folder / "model.onnx"
    if not path.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (images,), str(path), dynamo=False, input_names=["x"])
    return path


def _onnx_runtime(model: nn.Module, images: torch.Tensor, folder: Path) -> dict[str, Run]:
    ort, quantization = import_module("onnxruntime"), import_module("onnxruntime.quantization")
    path, eight = _onnx(model, images, folder), folder / "dynamic.onnx"
    quantization.quantize_dynamic(path, eight, op_types_to_quantize=["MatMul", "Gemm"])
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    feed = {"x": images.numpy()}

    def engine(file: Path) -> Run:
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, feed)

    return {"ONNX Runtime float32": engine(path), "ONNX Runtime int8": engine(eight)}


def _openvino(model: nn.Module, images: torch.Tensor, folder: Path) -> dict[str, Run]:
    core, path = import_module("openvino").Core(), _onnx(model, images, folder)
    feed = [images.numpy()]

    def engine(network: Any) -> Run:
        settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        request = core.compile_model(network, "CPU", settings).create_infer_request()
        return lambda: request.infer(feed)

    engines = {"OpenVINO float32": engine(core.read_model(path))}
    nncf = import_module("nncf")
    data = nncf.Dataset(
        [np.random.default_rng(i).standard_normal(images.shape, np.float32) for i in range(2)]
    )
    eight = nncf.quantize(
        core.read_model(path), data, model_type=nncf.ModelType.TRANSFORMER, subset_size=2
    )
    return engines | {"OpenVINO int8 (NNCF)": engine(eight)}


def timed(engines: dict[str, Run], rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of processor time of each call, by engine and round."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    with torch.inference_mode():
        for round_ in range(rounds + 1):
            for name, run in engines.items():
                start = time.process_time()
                for _ in range(repeats):
                    run()
                if round_:  # the first round warms up
                    times[name].append((time.process_time() - start) / repeats)
    return times


def report(title: str, times: dict[str, list[float]], unit: float = 1e3, name: str = "ms") -> Table:
    """Times of each engine, and how many of ours they are."""
    table = Table("engine", f"{name}, least", f"{name}, median", "times ours", title=title)
    for engine, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[OURS], strict=True)]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        middle = statistics.median(seconds)
        table.add_row(engine, f"{unit * min(seconds):.1f}", f"{unit * middle:.1f}", spread)
    return table


def keep(
    path: Path, model: str, batch: int, times: dict[str, list[float]], sizes: dict[str, int]
) -> None:
    """Add a line for each engine to a file of results."""
    common = {
        "model": model,
        "batch": batch,
        "instruction_set": kernels.instruction_set(),
        "torch": torch.__version__,
    }
    with path.open("a") as file:
        for engine, seconds in times.items():
            ratios = [a / b for a, b in zip(seconds, times[OURS], strict=True)]
            row = {
                "engine": engine,
                "seconds_least": min(seconds),
                "seconds_median": statistics.median(seconds),
                "times_ours": statistics.median(ratios),
                "times_ours_least": min(ratios),
                "times_ours_most": max(ratios),
            }
            if engine in sizes:
                row["size_bytes"] = sizes[engine]
            file.write(json.dumps(common | row) + "\n")


def limit() -> float:
    """Binary operations a second that the processor can do in registers."""

    def rates() -> Iterator[float]:
        for _ in range(5):
            start = time.process_time()
            done = popcounts.popcount_limit(500_000)
            yield done / (time.process_time() - start)

    popcounts = loader.native(kernels.instruction_set())
    return max(rates())


def _at(precision: str, run: Run) -> Run:
    def with_precision() -> None:
        torch.set_float32_matmul_precision(precision)
        run()

    return with_precision


def _keep_memory() -> None:
    """Have glibc keep large blocks that are freed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for threshold in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(threshold, 1 << 30)


if __name__ == "__main__":
    main()

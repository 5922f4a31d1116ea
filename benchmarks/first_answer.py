"""From the start of a process to its first answer, and its memory: a binary DeiT-S, no torch.

    python benchmarks/first_answer.py --rounds 9

Each round is a process of its own that imports the runtime, loads the file and names the class of
one image. Seconds are processor time of that process, its start included; memory is the most that
was resident at a time.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import qat
from binaryvit import BinaryQuantizers
from binaryvit.asm import DynamicShift, StaticShift
from binaryvit.convert import react_
from qat import Phase, Plan
from qat.export.pack import export_packed

ANSWER = """
import sys
import numpy as np
from qat import runtime
runtime.load(sys.argv[1])(np.zeros((1, 3, 224, 224), np.float32))
assert "torch" not in sys.modules
status = open("/proc/self/status").read()
print(status.split("VmHWM:")[1].split()[0])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    for blocks in ("plain", "react"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.lowbit"
            write(arguments.model, blocks, path)
            rounds = [answer(path) for _ in range(arguments.rounds)]
        seconds, wall, kibibytes = (
            statistics.median(column) for column in zip(*rounds, strict=True)
        )
        print(
            f"{arguments.model}, {blocks}: {seconds:.2f} s of processor time to the first answer, "
            f"{wall:.2f} s by the clock, {kibibytes / 1024:.0f} MiB",
            flush=True,
        )


def write(name: str, blocks: str, path: Path) -> None:
    """A packed file of random weights."""
    model = qat.timm_model(name).eval()
    convert, shift = {"plain": (qat.convert_, StaticShift), "react": (react_, DynamicShift)}[blocks]
    plan = Plan.load(Path(__file__).parents[1] / "configs" / "plans" / "vit_binary.yaml")
    convert(model, plan, BinaryQuantizers(shift=shift))
    qat.set_phase(model, Phase.QUANTIZE)
    export_packed(model, path)


def answer(path: Path) -> tuple[float, float, int]:
    """Processor seconds, seconds, and KiB of a process that answers once."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = [sys.executable, "-c", ANSWER, str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    found = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, wall, int(found.stdout)


if __name__ == "__main__":
    main()

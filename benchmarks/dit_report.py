"""A finished comparison of diffusion transformers as a page: its table, samples of each method.

    train.py quantize --config configs/dit/compare.yaml --run_dir runs/dit
    python benchmarks/dit_report.py runs/dit docs/results/mnist_dit.md

Writes the page and beside it images of the bit widths of `--show`, `NAME_BITS.png`: the first rows
of the samples of the first seed, the float model's above those of each method, from the same noise.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from adapt_report import spread
from PIL import Image, ImageDraw

METHODS = {
    "rtn": "RTN",
    "clipped": "clipped uniform",
    "smoothquant": "SmoothQuant",
    "hadamard": "Hadamard everywhere",
    "dual": "dual everywhere",
    "tlq": "TLQ alone",
    "ars": "ARS alone",
    "lrq": "**LRQ-DiT**",
    "lrq_plain": "LRQ-DiT, no scaling",
}
COLUMNS = {
    "noise_error": 4,
    "noise_gap": 5,
    "class_accuracy": 3,
    "frechet": 1,
    "sample_error": 3,
    "agreement": 3,
}
ONCE = {"seconds_calibration": 1, "size_bytes": 0}
ROWS_SHOWN = 3
SAMPLES_A_ROW = 10
TITLE = 18
"""Height of the line above the samples of a method, in pixels."""


def cells(runs: list[dict[str, Any]]) -> list[str]:
    """Mean and standard deviation of every column."""
    shown = []
    for column, digits in COLUMNS.items():
        shown.append(spread([run[column] for run in runs], digits, ","))
    return shown + [f"{mean(run[c] for run in runs):,.{d}f}" for c, d in ONCE.items()]


def sheet(folder: Path, bits: str, seed: int, file: Path) -> None:
    """The first rows of the sample grids of every method, under those of the float model."""
    names = [name for name in METHODS if (folder / f"{bits}-{name}-{seed}").is_dir()]
    grids = [("float", folder / f"{bits}-{names[0]}-{seed}" / "samples_float.png")]
    grids += [(METHODS[n].strip("*"), folder / f"{bits}-{n}-{seed}" / "samples.png") for n in names]
    images = [(title, Image.open(path)) for title, path in grids]
    width, height = images[0][1].width, images[0][1].height * ROWS_SHOWN // SAMPLES_A_ROW
    whole = Image.new("RGB", (width, (height + TITLE) * len(images)), "white")
    draw = ImageDraw.Draw(whole)
    for i, (title, image) in enumerate(images):
        top = i * (height + TITLE)
        draw.text((2, top + TITLE // 2), title, fill="black", anchor="lm")
        whole.paste(image.crop((0, 0, width, height)), (0, top + TITLE))
    whole.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of a comparison")
    parser.add_argument("page", type=Path)
    parser.add_argument("--show", nargs="+", default=["w4a4", "w3a4"], help="widths to draw")
    arguments = parser.parse_args()
    table = json.loads((arguments.run / "metrics.json").read_text())["table"]
    headings = ["bits", "method", "seeds", *COLUMNS, *ONCE]
    lines = [f"| {' | '.join(h.replace('_', ' ') for h in headings)} |"]
    lines.append("|---|---|" + "---:|" * (len(headings) - 2))
    for bits in dict.fromkeys(row["bits"] for row in table):
        for name, title in METHODS.items():
            runs = [row for row in table if (row["bits"], row["method"]) == (bits, name)]
            if runs:
                lines.append(
                    f"| {' | '.join([bits.upper(), title, str(len(runs)), *cells(runs)])} |"
                )
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    for bits in arguments.show:
        image = arguments.page.with_name(f"{arguments.page.stem}_{bits}.png")
        sheet(arguments.run, bits, min(row["seed"] for row in table), image)
        lines += ["", f"Samples at {bits.upper()}, the same noise for all:"]
        lines += ["", f"![samples at {bits}]({image.name})"]
    arguments.page.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Milliseconds of every corruption on one image, one core.

    python benchmarks/corruptions.py --style imagenet

The image is a photograph that scikit-learn ships, cut to 224 pixels (`cifar`: scaled to 32). The
time of a corruption is the median over repeats of the mean over the five severities; what is made
once for all images, such as kernels and frost textures, is made before. Times are those of the
processor, on one thread.
"""

import argparse
import statistics
import time

import cv2
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from qat.data.corruptions import CORRUPTIONS, HELD_OUT, Domain, Style, corrupt


def photograph(style: Style) -> np.ndarray:
    image = Image.fromarray(load_sample_image("flower.jpg")).crop((160, 100, 384, 324))
    return np.asarray(image if style == "imagenet" else image.resize((32, 32)))


def milliseconds(image: np.ndarray, name: str, style: Style, repeats: int) -> float:
    times = []
    for repeat in range(-1, repeats):
        start = time.process_time()
        for severity in range(1, 6):
            corrupt(image, Domain(name, severity), style, (0, repeat + 1))
        times.append((time.process_time() - start) / 5)
    return 1000 * statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--style", choices=["imagenet", "cifar"], default="imagenet")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    image = photograph(arguments.style)
    total = 0.0
    for name in (*CORRUPTIONS, *HELD_OUT):
        took = milliseconds(image, name, arguments.style, arguments.repeats)
        total += took if name in CORRUPTIONS else 0
        print(f"{name:20s} {took:7.2f} ms")
    print(f"{'all 15':20s} {total:7.2f} ms")


if __name__ == "__main__":
    main()

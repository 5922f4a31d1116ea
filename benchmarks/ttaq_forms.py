"""Forms of PEM and PCR on the four held-out corruptions, which is where TTAQ's may be chosen.

    python benchmarks/ttaq_forms.py --plan w3a3 \
        --form pem=none --form pem=A,pem_weight=0.03

The CIFAR-10 ViT-Ti of the assets, calibrated on training images; test images, clean and under
severity 5 of speckle noise, Gaussian blur, spatter and saturate. A line of JSON for each form:

    error          share of wrong answers, clean and mean over the four corruptions
    gap            relative distance of the logits from the float model's on the same images
    shift          change of the logits under a corruption, over that of the float model
    flips          share of clean images whose answer a mild perturbation changes
    gain           |W^ e| / |W e| for the change e of a layer's input under a corruption, W the
                   weight before training, geometric mean over the layers of the blocks
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ptq_init.repq_vit import RepQViT
from ptq_init.ttaq import TTAQ, WeakPerturbation
from qat import convert_
from qat.card import expected_by
from qat.data.corrupted import Generated
from qat.data.corruptions import HELD_OUT
from qat.data.protocols import Continual
from qat.data.sources import parquet
from qat.data.streams import Stream
from qat.layers import quantized_weights, through
from qat.models import timm_model
from qat.plan import load_plan
from qat.quantizers import PerOperand, TanQ

ASSETS = os.environ.get("LOWBIT_ASSETS", "")
PLAIN: dict[str, Any] = {"pem": "none", "pcr": "none"}


def float_model() -> nn.Module:
    return timm_model(
        "vit_tiny_patch16_224",
        img_size=96,
        weights=f"{ASSETS}/weights/vit_tiny_cifar10_96px.safetensors",
        data_config={"crop_pct": 1.0},
    ).eval()


def converted(plan: str) -> nn.Module:
    model = float_model()
    convert_(model, load_plan(plan), PerOperand(attention=TanQ))
    return model


def images(split: str, corruption: str, count: int) -> tuple[Tensor, Tensor]:
    """Images of the data set and their labels, the same ones for every corruption."""
    source = Generated(parquet(f"{ASSETS}/data/cifar10/{split}.parquet", "img", "label"), "cifar")
    expects = expected_by(float_model())
    stream = Stream(source, Continual((corruption,)), expects, count, num_images=count)
    order = stream[0].indices.argsort()
    return stream[0].images[order], stream[0].labels[order]


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(50)])


@torch.no_grad()
def input_changes(model: nn.Module, clean: Tensor, view: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Layers of the blocks, and the change of their quantized input."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, _, _ in quantized_weights(model):
        layer: Any = model.get_submodule(name)

        def keep(layer: Any, inputs: tuple[Tensor], name: str = name) -> None:
            seen.setdefault(name, []).append(through(layer.input_quantizer, inputs[0]))

        handles.append(layer.register_forward_pre_hook(keep))
    model(clean)
    model(view)
    for handle in handles:
        handle.remove()
    for name, (first, second) in seen.items():
        if name.startswith("blocks"):
            yield name, (second - first).flatten(0, -2)


@torch.no_grad()
def gain(start: nn.Module, model: nn.Module, clean: Tensor, view: Tensor) -> float:
    ratios = []
    for name, change in input_changes(model, clean, view):
        layer: Any = model.get_submodule(name)
        before: Any = start.get_submodule(name)
        ours = change @ through(layer.weight_quantizer, layer.weight).T
        ratios.append((ours.norm() / (change @ before.weight.T).norm()).log())
    return torch.stack(ratios).mean().exp().item()


def settings(form: str) -> dict[str, Any]:
    found = dict(pair.split("=") for pair in form.split(","))
    words = ("pem", "pcr", "rounding")
    return {key: value if key in words else float(value) for key, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", default="w3a3")
    parser.add_argument("--form", action="append", default=[], help="settings of TTAQ, joined by ,")
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--num_calibration", type=int, default=96)
    parser.add_argument("--num_images", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    batch = images("train", "clean", arguments.num_calibration)[0]
    names = ("clean", *HELD_OUT)
    data = {name: images("test", name, arguments.num_images) for name in names}
    exact = {name: logits(float_model(), x) for name, (x, _) in data.items()}
    clean = data["clean"][0]
    mild = WeakPerturbation()(clean, torch.Generator().manual_seed(7))
    start = converted(arguments.plan)
    RepQViT("paper", per_token=True)(start, [batch[:32]])
    for form in arguments.form or ["pem=none"]:
        for seed in range(arguments.seeds):
            model, begun = converted(arguments.plan), time.process_time()
            chosen = {**PLAIN, **settings(form), "seed": seed, "num_steps": arguments.num_steps}
            TTAQ(**chosen, batch_size=12)(model, [batch])
            seconds = time.process_time() - begun
            found = {name: logits(model.eval(), x) for name, (x, _) in data.items()}

            def mean(values: dict[str, float]) -> float:
                return sum(values[name] for name in HELD_OUT) / len(HELD_OUT)

            errors = {
                n: (found[n].argmax(1) != y).float().mean().item() for n, (_, y) in data.items()
            }
            gaps = {n: ((found[n] - z).norm() / z.norm()).item() for n, z in exact.items()}
            shifts = {
                n: ((found[n] - found["clean"]).norm() / (z - exact["clean"]).norm()).item()
                for n, z in exact.items()
                if n != "clean"
            }
            changed = logits(model, mild).argmax(1) != found["clean"].argmax(1)
            gains = {n: gain(start, model, clean[:16], data[n][0][:16]) for n in HELD_OUT}
            row = {
                "plan": arguments.plan,
                "form": form,
                "seed": seed,
                "error_clean": errors["clean"],
                "error_held_out": mean(errors),
                "gap_clean": gaps["clean"],
                "gap_held_out": mean(gaps),
                "shift": mean(shifts),
                "flips": changed.float().mean().item(),
                "gain": mean(gains),
                "seconds": seconds,
            }
            rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            print(json.dumps(rounded), flush=True)


if __name__ == "__main__":
    main()

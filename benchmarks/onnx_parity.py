"""ONNX files beside the models that they came from, and their speed beside other int8 files.

    python benchmarks/onnx_parity.py vit --widths 8,6,4,3 --num_images 200
    python benchmarks/onnx_parity.py others
    python benchmarks/onnx_parity.py families
    python benchmarks/onnx_parity.py speed

`vit` is the real ViT-Ti of the assets on its validation images; `others` are a Swin and a ResNet of
random weights, a binary student and the MNIST DiT of the assets; `families` are those of the zoo;
`speed` compares W8A8 in one thread, in turns, by processor time. Prints JSON, a line for each.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from zoo import lines_of, parse

import qat
from binaryvit import BinaryQuantizers
from binaryvit.convert import react_
from qat.calibrate import Batch
from qat.card import expected_by
from qat.cli.inputs import preparing
from qat.diffusion.build import mnist_dit
from qat.export import acceleration
from qat.export.onnx import export_onnx
from qat.export.onnx_file import OnnxModel
from qat.export.runtimes import compiled_of, has_openvino, session_of
from qat.export.verify import verify
from qat.models import example_inputs
from qat.plan import Plan, load_plan
from qat.quantizers import Affine, PercentileMSE
from qat.reading import read_file

ASSETS = Path(os.environ.get("LOWBIT_ASSETS", "../shared"))
FAMILIES = (
    *("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_dinov2"),
    *("vit_small_patch16_dinov3", "swin_tiny_patch4_window7_224", "resnet18", "test_vit"),
    *("vit_base_patch16_clip_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"),
    *("cait_xxs24_224", "xcit_nano_12_p16_224", "levit_128s", "pit_ti_224", "pvt_v2_b0"),
    *("convit_tiny", "mixer_s32_224", "convnext_atto", "mobilevit_xxs", "efficientnet_b0"),
    *("swinv2_tiny_window8_256", "poolformer_s12", "hiera_tiny_224", "mobilenetv3_small_050"),
)
BINARY = Path(__file__).parents[1] / "configs" / "plans" / "vit_binary.yaml"
SMALL_SWIN = {"embed_dim": 48, "depths": (2, 2, 2, 2)}
SUFFIXES = (".jpg", ".JPEG")
ROUNDS = 5


def symmetric_weights(widths: str) -> Plan:
    """The uniform plan with weights around zero, as OpenVINO wants them."""
    rules = load_plan(widths).to_list()
    for rule in rules:
        rule["weight"]["signed"] = True
    return Plan.from_list(rules)


def vit_tiny() -> nn.Module:
    """The trained ViT-Ti of the assets."""
    weights = str(ASSETS / "weights" / "vit_tiny_patch16_224.safetensors")
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.9}
    return qat.timm_model("vit_tiny_patch16_224", weights=weights, data_config=half).eval()


def photos(model: nn.Module, folder: str, count: int) -> Tensor:
    """The first photos of a folder of the assets, as the model takes them."""
    prepare = preparing(expected_by(model))
    files = [f for f in sorted((ASSETS / "data" / folder).rglob("*")) if f.suffix in SUFFIXES]
    chosen = files[:: max(1, len(files) // count)][:count]
    return torch.from_numpy(np.stack([prepare(read_file(path)) for path in chosen]))


def quantized(model: nn.Module, plan: Plan, inputs: Batch) -> nn.Module:
    """A model on grids of least squared error."""
    qat.convert_(model, plan, partial(Affine, observer=PercentileMSE))
    qat.calibrate(model, [inputs])  # type: ignore[list-item]
    return model.eval()


def compared(name: str, model: nn.Module, inputs: Batch) -> dict[str, Any]:
    """Export, check in ONNX Runtime, and count what runs on integers."""
    begun = time.process_time()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, path)
        exported = time.process_time() - begun
        found = verify(model, OnnxModel(path), [inputs])
        items = {"name": name, "bytes": path.stat().st_size, "seconds_export": round(exported, 1)}
        counts = acceleration.items(acceleration.products(model, path))
    traced = [(one.grid, one.distance) for one in found.faults[:3]]
    return {**items, **found.items(), **counts, "wrong": found.wrong, "faults": traced}


def vit(widths: str, num_images: int) -> Iterator[dict[str, Any]]:
    """The real ViT-Ti at several widths."""
    for width in widths.split(","):
        model = vit_tiny()
        quantized(model, load_plan(f"w{width}a{width}"), photos(model, "imagenet-sample/val", 32))
        images = photos(model, "imagenet-val650/images", num_images)
        yield compared(f"vit_tiny w{width}a{width}", model, images)


def others() -> Iterator[dict[str, Any]]:
    """Other architectures and grids."""
    noisy = (torch.randn(40, 1, 28, 28), torch.arange(0, 1000, 25), torch.arange(40) % 10)
    for width in (8, 4):
        dit = mnist_dit(str(ASSETS / "weights" / "dit_mnist.pth"))
        plan = load_plan(f"w{width}a{width}")
        yield compared(f"MNIST DiT w{width}a{width}", quantized(dit, plan, noisy), noisy)
    model = qat.timm_model("vit_tiny_patch16_224", img_size=96, num_classes=10)
    react_(model, Plan.load(BINARY), BinaryQuantizers())
    images = torch.randn(8, 3, 96, 96)
    qat.calibrate(model, [images])
    yield compared("binary vit_tiny, 96 pixels, random weights", model.eval(), images)
    for name, arguments in (("resnet18", {}), ("swin_tiny_patch4_window7_224", SMALL_SWIN)):
        model = qat.timm_model(name, model_args=arguments).eval()
        images = torch.randn(4, 3, 224, 224)
        yield compared(f"{name} w8a8", quantized(model, load_plan("w8a8"), images), images)


def families(names: Collection[str] = FAMILIES) -> Iterator[dict[str, Any]]:
    """A batch of two images through a model of each family."""
    for line in lines_of(ASSETS / "zoo.txt"):
        name, arguments = parse(line)
        if name in names:
            try:
                model = qat.timm_model(name, **arguments).eval()
                inputs = tuple(torch.cat([x, x]).normal_() for x in example_inputs(model))
                row = compared(name, quantized(model, load_plan("w8a8"), inputs[0]), inputs)
            except ValueError as error:
                row = {"name": name, "error": str(error)}
            yield row


def speed() -> Iterator[dict[str, Any]]:
    """W8A8 of the real ViT-Ti beside ONNX Runtime's own int8 file of the float model."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        model = vit_tiny()
        images = photos(model, "imagenet-sample/val", 32)
        names = ("float", "all", "products", "ours")
        path, theirs, products, ours = (Path(folder) / f"{name}.onnx" for name in names)
        export_onnx(model, path)
        _static_int8(path, theirs, images.numpy(), None)
        _static_int8(path, products, images.numpy(), ["MatMul", "Gemm", "Conv"])
        export_onnx(quantized(model, symmetric_weights("w8a8"), images), ours)
        one = images[:1].numpy()
        engines = {"onnxruntime": _in_onnx_runtime}
        engines |= {"openvino": _in_openvino} if has_openvino() else {}
        runs = {
            f"{name} {file.stem}": engine(file, one)
            for name, engine in engines.items()
            for file in (path, theirs, products, ours)
        }
        rounds = [{name: _seconds(run) for name, run in runs.items()} for _ in range(ROUNDS)]
        found = {name: median(each[name] for each in rounds) for name in runs}
    yield {"milliseconds": {name: round(1000 * value, 2) for name, value in found.items()}}
    best = min(found[f"onnxruntime {name}"] for name in ("all", "products"))
    yield {"ours against the better of ONNX Runtime's own": best / found["onnxruntime ours"]}


def _static_int8(path: Path, out: Path, images: np.ndarray, operators: list[str] | None) -> None:
    """ONNX Runtime's own static quantization of some operators or all, weights by channel."""
    module = import_module("onnxruntime.quantization")

    class Reader(module.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter({"images": image[None]} for image in images)

        def get_next(self) -> Any:
            return next(self.left, None)

    module.quantize_static(
        path,
        out,
        Reader(),
        per_channel=True,
        op_types_to_quantize=operators,
        activation_type=module.QuantType.QUInt8,  # its default, QInt8, gives a file that it refuses
    )


def _in_onnx_runtime(path: Path, image: np.ndarray) -> Callable[[], Any]:
    session = session_of(path.read_bytes(), intra_op_num_threads=1)
    return lambda: session.run(None, {"images": image})


def _in_openvino(path: Path, image: np.ndarray) -> Callable[[], Any]:
    compiled = compiled_of(path.read_bytes())
    return lambda: compiled({"images": image})


def _seconds(run: Callable[[], Any]) -> float:
    run()
    begun = time.process_time()
    for _ in range(3):
        run()
    return (time.process_time() - begun) / 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["vit", "others", "families", "speed"])
    parser.add_argument("--widths", default="8,6,4,3")
    parser.add_argument("--num_images", type=int, default=650)
    given = parser.parse_args()
    torch.manual_seed(0)
    made = {"vit": partial(vit, given.widths, given.num_images), "others": others}
    made |= {"families": families, "speed": speed}
    for row in made[given.what]():
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

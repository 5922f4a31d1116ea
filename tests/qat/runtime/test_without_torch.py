"""A packed file runs in a process that has no torch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

import qat
from binaryvit import BinaryQuantizers
from binaryvit.asm import DynamicShift
from binaryvit.convert import react_
from qat import runtime
from qat.export.pack import export_packed
from qat.runtime.images import Images
from tests.qat.common import plan
from tests.qat.export.common import student

ROOT = Path(__file__).parents[3]
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "timm", "torchvision", "scipy", "yaml", "jaxtyping"}:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Blocked())
sys.path.insert(0, "examples")
import serve_folder
serve_folder.main(*sys.argv[1:])
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a packed file, and one with two images and one that is none."""
    folder = tmp_path_factory.mktemp("served")
    model = student(plan(1), BinaryQuantizers(shift=DynamicShift), torch.randn(4, 1, 8, 8), react_)
    export_packed(model, folder / "model.lowbit")
    (folder / "images").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (13, 17), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    (folder / "images" / "x.png").write_bytes(b"none")
    return folder


def test_the_example_serves_a_folder_where_torch_cannot_be_imported(folder: Path) -> None:
    words = [sys.executable, "-c", BLOCKED, folder / "model.lowbit", folder / "images"]
    found = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    model = qat.load(folder / "model.lowbit")
    prepare = runtime.load(folder / "model.lowbit").images.prepare
    for line, i in zip(found.stdout.splitlines(), range(2), strict=True):
        image = Image.open(folder / "images" / f"{i}.png")
        confidences = model(torch.from_numpy(prepare(image))[None]).softmax(1)[0]
        name, index, confidence = line.split("\t")
        assert (name, int(index)) == (f"{i}.png", int(confidences.argmax()))
        assert float(confidence) == pytest.approx(confidences.max().item(), abs=1e-4)
    assert "x.png' cannot be read" in found.stderr


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("size", "crop_pct"), [((40, 31), 0.9), ((30, 57), 1.0), ((32, 32), 0.5)])
@pytest.mark.parametrize("sides", [(28, 28), (28, 36), (36, 20)])
def test_preprocessing_is_that_of_timm_to_the_last_bit(
    channels: int,
    interpolation: str,
    size: tuple[int, int],
    crop_pct: float,
    sides: tuple[int, int],
) -> None:
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    preprocessing = {
        "input_size": [channels, *sides], "mean": mean, "std": std, "crop_pct": crop_pct,
        "interpolation": interpolation, "crop_mode": "center",
    }  # fmt: skip
    prepare = Images.of_card({"preprocessing": preprocessing}, (channels, *sides)).prepare
    shape = (*size, 3) if channels == 3 else size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    transform = create_transform(
        (channels, *sides), interpolation=interpolation, mean=mean, std=std, crop_pct=crop_pct
    )
    assert (prepare(image) == transform(image).numpy()).all()  # type: ignore[operator]


def test_images_of_another_shape_or_type_are_refused(folder: Path) -> None:
    model = runtime.load(folder / "model.lowbit")
    for wrong in (np.zeros((1, 8, 8), "f4"), np.zeros((1, 1, 9, 8), "f4"), np.zeros((1, 1, 8, 8))):
        with pytest.raises(ValueError, match=r"takes float32 images of shape \(batch, 1, 8, 8\)"):
            model(wrong)
    with pytest.raises(ValueError, match="cannot be read"):
        model.predict([folder / "images" / "x.png"])


def test_an_empty_batch_and_a_batch_of_many_give_each_image_its_own_answer(folder: Path) -> None:
    model = runtime.load(folder / "model.lowbit")
    images = np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32)
    together = model(images)
    assert model(images[:0]).shape == (0, 10)
    for i in range(5):
        np.testing.assert_allclose(model(images[i : i + 1])[0], together[i], atol=2e-6)


def test_an_entry_of_the_table_is_replaced_by_name(folder: Path) -> None:
    """What native kernels do."""
    calls = []

    def linear(*arguments: object) -> np.ndarray:
        calls.append(arguments)
        return runtime.REFERENCE["binary_linear"](*arguments)

    table = {**runtime.REFERENCE, "binary_linear": linear}
    images = np.zeros((1, 1, 8, 8), np.float32)
    expected = runtime.load(folder / "model.lowbit", runtime.REFERENCE)(images)
    found = runtime.load(folder / "model.lowbit", table)(images)
    assert (found == expected).all() and len(calls) == 8

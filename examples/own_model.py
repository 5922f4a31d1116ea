"""Quantize a model of one's own to four bits, save it, export it. Needs the extra `export`."""

import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat.export.onnx import export_onnx


class Mixer(nn.Module):
    """Four patches of an 8x8 image, mixed once by attention."""

    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 4, stride=4)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images (N, 1, 8, 8)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        tokens = tokens + (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.head(self.norm(tokens).mean(1))


def main(folder: str = ".") -> None:
    """Accuracy in float, on four bits after loading, and of the ONNX file in its runtime."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    model, pixels = Mixer(), qat.Preprocessing((1, 8, 8), (0.5,), (0.5,), "bicubic", 1.0, "center")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        F.cross_entropy(model(images[:1400]), labels[:1400]).backward()
        optimizer.step(), optimizer.zero_grad()

    recipe = {"class_path": f"{Mixer.__module__}.Mixer", "init_args": {"dim": 48}}
    qat.adopt(model.eval(), recipe=recipe, preprocessing=pixels)
    answers = {"float": model(images[1400:])}
    qat.convert_(model, qat.Plan.uniform(weight=4, activation=4), qat.quantizers.Affine)
    qat.calibrate(model, [images[:64]])
    qat.save(model, f"{folder}/mixer.ckpt")
    again = qat.load(f"{folder}/mixer.ckpt", trust=(Mixer.__module__,))  # it may name this module
    answers["w4a4"] = again(images[1400:])
    export_onnx(model, f"{folder}/mixer.onnx")
    session = onnxruntime.InferenceSession(f"{folder}/mixer.onnx")
    answers["onnx"] = torch.tensor(session.run(None, {"images": images[1400:].numpy()})[0])
    for name, logits in answers.items():
        print(f"{name} top-1: {(logits.argmax(1) == labels[1400:]).float().mean():.3f}")


if __name__ == "__main__":
    main()

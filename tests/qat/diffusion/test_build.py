"""The loader of the assets' MNIST DiT, against its forward pass as their README states it."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import qat
from qat.diffusion.build import mnist_dit

WIDTH, HEADS, TOKENS = 64, 4, 49


def _file() -> dict[str, Tensor]:
    """Random tensors with the names and shapes of the file."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "patchPosEmb": (1, TOKENS, WIDTH),
        "conv.weight": (16, 1, 4, 4),
        "conv.bias": (16,),
        "timeEmb.0.halfEmb": (32,),
        "labelEmb.weight": (10, WIDTH),
        "layerNorm.weight": (WIDTH,),
        "layerNorm.bias": (WIDTH,),
    }
    linears = {"patchEmb": (WIDTH, 16), "l2p": (16, WIDTH)}
    linears |= {f"timeEmb.{i}": (WIDTH, WIDTH) for i in (1, 3)}
    for block in range(3):
        name = f"dits.{block}."
        for i in (1, 2):
            linears |= {f"{name}{kind}{i}": (WIDTH, WIDTH) for kind in ("gamma", "beta", "alpha")}
            shapes |= {f"{name}layerNorm{i}.{kind}": (WIDTH,) for kind in ("weight", "bias")}
        linears |= {f"{name}w{kind}": (HEADS * 64, WIDTH) for kind in "qkv"}
        linears |= {f"{name}lv": (WIDTH, HEADS * 64), f"{name}ff.0": (4 * WIDTH, WIDTH)}
        linears[f"{name}ff.2"] = (WIDTH, 4 * WIDTH)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    state = {k: 0.1 * torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    state["timeEmb.0.halfEmb"] = torch.exp(-torch.tensor(10000.0).log() * torch.arange(32) / 31)
    return state


def _forward(s: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The README's lines, one by one."""

    def linear(name: str, v: Tensor) -> Tensor:
        return F.linear(v, s[f"{name}.weight"], s[f"{name}.bias"])

    def norm(name: str, v: Tensor) -> Tensor:
        return F.layer_norm(v, (WIDTH,), s[f"{name}.weight"], s[f"{name}.bias"])

    angles = t[:, None] * s["timeEmb.0.halfEmb"]
    c = F.gelu(linear("timeEmb.1", torch.cat([angles.sin(), angles.cos()], 1)))
    c = linear("timeEmb.3", c) + s["labelEmb.weight"][y]
    h = F.conv2d(x, s["conv.weight"], s["conv.bias"], stride=4).flatten(2).transpose(1, 2)
    h = linear("patchEmb", h) + s["patchPosEmb"]
    for i in range(3):
        p = f"dits.{i}."
        g1, b1, a1, g2, b2, a2 = (
            linear(f"{p}{kind}{j}", c)[:, None]
            for j in (1, 2)
            for kind in ("gamma", "beta", "alpha")
        )
        z = norm(f"{p}layerNorm1", h) * (1 + g1) + b1
        q, k, v = (
            linear(f"{p}w{kind}", z).view(len(x), TOKENS, HEADS, 64).transpose(1, 2)
            for kind in "qkv"
        )
        z = (q @ k.transpose(-1, -2) / 7).softmax(-1) @ v
        h = h + linear(f"{p}lv", z.transpose(1, 2).flatten(2)) * a1
        z = norm(f"{p}layerNorm2", h) * (1 + g2) + b2
        h = h + linear(f"{p}ff.2", F.relu(linear(f"{p}ff.0", z))) * a2
    patches = linear("l2p", norm("layerNorm", h)).view(-1, 7, 7, 4, 4)
    return patches.permute(0, 1, 3, 2, 4).reshape(-1, 1, 28, 28)


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    return images, torch.tensor([0, 500, 999]), torch.tensor([0, 4, 9])


def test_loaded_model_computes_what_the_file_says(tmp_path: Path) -> None:
    state = _file()
    torch.save(state, tmp_path / "dit.pth")
    model = mnist_dit(str(tmp_path / "dit.pth"))
    assert_close(model(*_inputs()), _forward(state, *_inputs()), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("LOWBIT_ASSETS" not in os.environ, reason="no LOWBIT_ASSETS")
def test_trained_model_of_the_assets_loads_exactly() -> None:
    path = f"{os.environ['LOWBIT_ASSETS']}/weights/dit_mnist.pth"
    state = torch.load(path, weights_only=True, map_location="cpu")
    assert_close(mnist_dit(path)(*_inputs()), _forward(state, *_inputs()), rtol=1e-4, atol=2e-5)


def test_loaded_model_needs_no_asset_to_be_rebuilt(tmp_path: Path) -> None:
    torch.save(_file(), tmp_path / "dit.pth")
    model = mnist_dit(str(tmp_path / "dit.pth"))
    (tmp_path / "dit.pth").unlink()
    qat.save(model, tmp_path / "model.ckpt")
    assert torch.equal(qat.load(tmp_path / "model.ckpt")(*_inputs()), model(*_inputs()))


def test_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no weights file .* is LOWBIT_ASSETS set"):
        mnist_dit(str(tmp_path / "none.pth"))
    torch.save({"head.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"is not the MNIST DiT .* layout of dit_mnist.pth"):
        mnist_dit(str(tmp_path / "other.pth"))

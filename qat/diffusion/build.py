"""Build a DiT in a way that a checkpoint can repeat; read the trained one of the assets."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.card import amend, start_of
from qat.diffusion.model import DiT
from qat.preprocessing import Preprocessing

MNIST = {
    "img_size": 28,
    "dim": 64,
    "depth": 3,
    "num_heads": 4,
    "head_dim": 64,
    "act": "relu",
    "modulation_act": "identity",
    "null_class": False,
}
"""The architecture of the assets' `dit_mnist.pth`, after `fold_mnist`."""


def dit(**arguments: Any) -> DiT:
    """A DiT with a card: pixels in [-1, 1].

    Args:
        arguments: Those of `DiT`.
    """
    model = DiT(**arguments)
    recipe = {"class_path": "qat.diffusion.build.dit", "init_args": arguments}
    half = (0.5,) * model.in_chans
    size = (model.in_chans, model.img_size, model.img_size)
    pixels = Preprocessing(size, half, half, "bicubic", 1.0, "center")
    amend(model, recipe=recipe, preprocessing=pixels, start=start_of(model, "every layer"))
    return model


def mnist_dit(weights: str) -> DiT:
    """The trained MNIST DiT in a file of the layout of the assets' `dit_mnist.pth`.

    Args:
        weights: The file.

    Raises:
        ValueError: If it is missing, holds code, or is of another model.
    """
    if not Path(weights).is_file():
        raise ValueError(f"no weights file '{weights}'; if it is an asset, is LOWBIT_ASSETS set?")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        folded = fold_mnist(state)
        model = dit(**MNIST)
        model.load_state_dict(folded)
        amend(model, start=None)
    except Exception as error:  # a damaged file can fail in any way
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"weights file '{weights}' is not the MNIST DiT that this reads ({line[:160]}); it "
            "expects the layout of dit_mnist.pth"
        ) from None
    return model.eval()


def fold_mnist(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of `dit_mnist.pth`, and fold into them what our DiT has no place for.

    All of it is exact but for rounding. In there a convolution is followed by a linear layer, which
    makes one convolution. Its norms have weights w and biases v, and

        (w n + v)(1 + g) + b = n (1 + [w (1 + g) - 1]) + [v (1 + g) + b]

    is again a modulation of n, linear in the condition. Attention logits are divided by 7 where
    timm divides by 8, so that queries grow by 8 / 7.
    """
    wide = {key: value.double() for key, value in state.items()}
    patch, conv = wide["patchEmb.weight"], wide["conv.weight"]
    found = {
        "patch_embed.proj.weight": (patch @ conv.flatten(1)).view(-1, *conv.shape[1:]),
        "patch_embed.proj.bias": patch @ wide["conv.bias"] + wide["patchEmb.bias"],
        "pos_embed": wide["patchPosEmb"],
        "label_embed.weight": wide["labelEmb.weight"],
        "head.weight": wide["l2p.weight"],
        "head.bias": wide["l2p.bias"],
    }
    for theirs, ours in (("1", "fc1"), ("3", "fc2")):
        for kind in ("weight", "bias"):
            found[f"time_embed.mlp.{ours}.{kind}"] = wide[f"timeEmb.{theirs}.{kind}"]
    gain, shift = wide["layerNorm.weight"], wide["layerNorm.bias"]
    found["modulation.linear.bias"] = torch.cat([gain - 1, shift])
    found["modulation.linear.weight"] = torch.zeros(2 * len(gain), len(gain))
    for i in range(MNIST["depth"]):
        block = {k.removeprefix(f"dits.{i}."): v for k, v in wide.items() if f"dits.{i}." in k}
        found |= {f"blocks.{i}.{key}": value for key, value in _fold_block(block).items()}
    return {key: value.float() for key, value in found.items()}


def _fold_block(block: dict[str, Tensor]) -> dict[str, Tensor]:
    weights, biases = [], []
    for i in ("1", "2"):
        gain, shift = block[f"layerNorm{i}.weight"], block[f"layerNorm{i}.bias"]
        scale, scale_bias = block[f"gamma{i}.weight"], block[f"gamma{i}.bias"]
        weights += [gain[:, None] * scale, shift[:, None] * scale + block[f"beta{i}.weight"]]
        biases += [gain * (1 + scale_bias) - 1, shift * (1 + scale_bias) + block[f"beta{i}.bias"]]
        weights.append(block[f"alpha{i}.weight"])
        biases.append(block[f"alpha{i}.bias"])
    grow = 8 / 7
    found = {"modulation.linear.weight": torch.cat(weights)}
    found["modulation.linear.bias"] = torch.cat(biases)
    for kind in ("weight", "bias"):
        qkv = [block[f"wq.{kind}"] * grow, block[f"wk.{kind}"], block[f"wv.{kind}"]]
        found[f"attn.qkv.{kind}"] = torch.cat(qkv)
        found[f"attn.proj.{kind}"] = block[f"lv.{kind}"]
        found[f"mlp.fc1.{kind}"] = block[f"ff.0.{kind}"]
        found[f"mlp.fc2.{kind}"] = block[f"ff.2.{kind}"]
    return found

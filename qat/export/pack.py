"""A model as a packed file: weights as codes, everything else as its checkpoint holds it."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qat import checkpoint as files
from qat.export.describe import INSTEAD, describe_network
from qat.export.tables import bounds_and_levels
from qat.layers import quantized_weights
from qat.packed import Packed, pack_codes, size, write
from qat.packed.network import Form
from qat.quantizers import Codes, Phase, Quantizer, quantizers
from qat.quantizers.companding import Companding

CARD = ("model", "preprocessing", "start", "class_names", "conversion", "versions")
"""What of a checkpoint's manifest an exported file holds."""


def export_packed(model: nn.Module, path: str | Path, *, half: bool = False) -> None:
    """Write a converted and calibrated model as a packed file.

    Args:
        model: The model.
        path: The file.
        half: Keep all other numbers in 16 bits, which changes the model a little.

    Raises:
        ValueError: If the model is not calibrated, or has a part that the runtime cannot run.
    """
    require_calibrated(model)
    write(path, contents(model, half=half))


def require_calibrated(model: nn.Module) -> None:
    """Refuse a model some of whose quantizers have no state yet.

    Raises:
        ValueError: Naming the first.
    """
    for name, quantizer in quantizers(model):
        if quantizer.phase is not Phase.QUANTIZE:
            raise ValueError(f"'{name}' is not calibrated; quantize or train the model first")


def packed_bytes(model: nn.Module, *, half: bool = False) -> int:
    """Bytes of the file that `export_packed` would write, calibrated or not, header included."""
    return size(contents(model, half=half))


def contents(model: nn.Module, *, half: bool = False) -> Packed:
    """What the packed file of a model holds.

    Raises:
        ValueError: If a part of the model cannot be packed.
    """
    network = describe_network(model)
    state = model.state_dict()
    tensors: dict[str, np.ndarray] = {}
    weights = {name: (weight, quantizer) for name, weight, quantizer in quantized_weights(model)}
    for key, value in state.items():
        layer, _, rest = key.rpartition(".weight_quantizer.")
        if isinstance(value, Tensor) and not (rest and layer in weights):
            layer, _, leaf = key.rpartition(".")
            if leaf != "weight" or layer not in weights:
                tensors[key] = _floats(key, value, half)
    for name, (weight, quantizer) in weights.items():
        tensors |= _weight(name, weight, quantizer, half)
    for name, quantizer in quantizers(model):
        if isinstance(quantizer, Companding):
            bounds, levels = bounds_and_levels(quantizer)
            tensors |= {f"{name}.bounds": bounds, f"{name}.levels": levels}
    return Packed(tensors, card_items(model), network.to_dict())


def card_items(model: nn.Module) -> dict[str, Any]:
    """The card of a model as an exported file holds it; `Manifest.of_card` reads it.

    Raises:
        ValueError: If nobody said how the model is built.
    """
    return {key: value for key, value in files.manifest(model, {}).items() if key in CARD}


def _weight(name: str, weight: Tensor, quantizer: Quantizer, half: bool) -> dict[str, np.ndarray]:
    """Codes, scale and zero point of a weight."""
    codes = quantizer.codes(weight.detach())
    _check_restored(name, quantizer, codes)
    form = Form.parse(quantizer.packed_form)
    values = codes.values.flatten(1).cpu().numpy().astype(np.int32)
    values = (values + 1) // 2 if form.kind == "b" else values - form.low
    below = f"{name}.weight_quantizer"
    found = {
        f"{name}.weight": pack_codes(values, form.bits),
        f"{below}.scale": _floats(f"{below}.scale", codes.scale.flatten(), half),
    }
    if codes.zero_point is not None:
        zero_point = codes.zero_point.detach().flatten().cpu().numpy() - form.low
        if (zero_point < 0).any() or (zero_point >= 2**form.bits).any():
            raise ValueError(f"'{name}' has a zero point outside of its grid; {INSTEAD}")
        found[f"{below}.zero_point"] = pack_codes(zero_point[None].astype(np.int32), form.bits)
    return found


def _check_restored(name: str, quantizer: Quantizer, codes: Codes) -> None:
    """Refuse a weight whose codes do not give it back, since `load` could not either."""
    try:
        other = copy.deepcopy(quantizer)
        kept = torch.equal(other.codes(other.restore(codes)).values, codes.values)
    except ValueError as error:
        raise ValueError(f"'{name}.weight': {error}; {INSTEAD}") from None
    if not kept:
        raise ValueError(f"'{name}.weight' is not given back by its codes; {INSTEAD}")


def _floats(name: str, value: Tensor, half: bool) -> np.ndarray:
    """A tensor of floating-point numbers, in 16 bits if asked for and it is no single number."""
    if value.dtype is not torch.float32:
        raise ValueError(
            f"'{name}' is {value.dtype}, the packed runtime computes in float32; convert the model "
            "with .float() before it is exported"
        )
    found: Any = value.detach().cpu().numpy()
    narrow = found.astype(np.float16) if half and found.size > 1 else found
    if not np.isfinite(narrow).all():
        raise ValueError(f"'{name}' holds values that are not finite, or too large for 16 bits")
    return narrow

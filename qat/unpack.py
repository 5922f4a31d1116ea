"""A packed file back in a torch model: codes become weights that have them, the rest is loaded."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from qat.layers import quantized_weights
from qat.packed import Packed, row_bytes, unpack_codes
from qat.packed.network import Form, Network
from qat.quantizers import Codes, Phase, Quantizer, set_phase


def fill_(model: nn.Module, packed: Packed) -> None:
    """Give a converted model what a packed file holds; its quantizers are in phase QUANTIZE then.

    Raises:
        ValueError: If the file does not fit the model.
    """
    operands = Network.from_dict(packed.network).operands
    rest = dict(packed.tensors)
    state = {k: v for k, v in model.state_dict().items() if k.endswith("_extra_state")}
    for name, weight, quantizer in quantized_weights(model):
        form = operands.get(name, {}).get("weight")
        if form is None or form != quantizer.packed_form:
            raise ValueError(f"the network gives '{name}.weight' the form {form}, the plan another")
        codes = _codes(name, rest, tuple(weight.shape), Form.parse(form))
        state[f"{name}.weight"] = quantizer.restore(codes)
        state |= {f"{name}.weight_quantizer.{k}": v for k, v in _restored(quantizer)}
    for name, value in rest.items():
        if not name.endswith((".bounds", ".levels")):
            state[name] = torch.from_numpy(value.astype(np.float32))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ValueError(f"it does not fit the model that it describes ({lines[:300]})") from None
    set_phase(model, Phase.QUANTIZE)


def _codes(name: str, rest: dict[str, np.ndarray], shape: tuple[int, ...], form: Form) -> Codes:
    """The codes of a weight; takes what they are made of out of `rest`."""
    below = f"{name}.weight_quantizer"
    rows, scale = rest.pop(f"{name}.weight", None), rest.pop(f"{below}.scale", None)
    outputs, k = shape[0], int(np.prod(shape[1:]))
    if rows is None or scale is None or scale.size not in (1, outputs):
        raise ValueError(f"it holds no codes, or no scale, of '{name}.weight'")
    if rows.dtype != np.uint8 or rows.shape != (outputs, row_bytes(k, form.bits)):
        raise ValueError(f"'{name}.weight' should hold {outputs} rows of {k} packed codes")
    values = _signed(unpack_codes(rows, k, form.bits), form).reshape(shape)
    zero_point = rest.pop(f"{below}.zero_point", None)
    if zero_point is not None:
        zero_point = _signed(unpack_codes(zero_point, scale.size, form.bits), form)
        zero_point = _along_rows(zero_point, shape).float()
    return Codes(values, _along_rows(torch.from_numpy(scale.astype(np.float32)), shape), zero_point)


def _signed(codes: np.ndarray, form: Form) -> Tensor:
    wide = torch.from_numpy(codes.astype(np.int32))
    return wide * 2 - 1 if form.kind == "b" else wide + form.low


def _along_rows(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One value for each row, or one for all, in a shape that broadcasts against the weight."""
    return values.reshape(-1, *(1 for _ in shape[1:])) if values.numel() > 1 else values.reshape(())


def _restored(quantizer: Quantizer) -> Iterator[tuple[str, object]]:
    """What a quantizer keeps of the grid it took."""
    return ((k, v) for k, v in quantizer.state_dict().items() if k != "_extra_state")

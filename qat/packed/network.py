"""What a packed file says of the network that runs it, checked before anything is built.

The network is a vision transformer of the timm family `VisionTransformer` (ViT, DeiT). Tensors have
the names they have there. A quantized operand has a form:

    b1                  binary weights: -1 and +1, a scale for each output
    s4, u4 (2 to 16)    equal steps, signed without, unsigned with a zero point
    token8              signed equal steps, a scale for each token, found when it arrives
    sign                sign of x - shift
    sign-mean           sign of x - shift - gain * mean over tokens
    sign-scaled         sign of (x - shift) / scale
    sign-standardized   sign of (x - mean) / sqrt(variance + 1e-6) - shift
    map                 0 and s: equal steps of one bit
    table4              the level between whose bounds x / scale lies
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

LARGEST_SIDE = 4096
LARGEST_TOKENS = 1 << 16
FORM = re.compile(r"([a-z-]+?)(\d{0,2})")
TENSORS = {
    "b": ("scale",),
    "s": ("scale",),
    "u": ("scale", "zero_point"),
    "token": (),
    "sign": ("shift.shift",),
    "sign-mean": ("shift.shift", "shift.gain"),
    "sign-scaled": ("shift.shift", "shift.scale"),
    "sign-standardized": ("shift.shift", "shift.mean", "shift.variance"),
    "map": ("scale",),
    "table": ("scale", "bounds", "levels"),
}
"""Names of the tensors of each kind of form."""
OPERANDS = {
    "weight": "weight_quantizer",
    "input": "input_quantizer",
    "query": "qk.left_quantizer",
    "key": "qk.right_quantizer",
    "attention": "av.left_quantizer",
    "value": "av.right_quantizer",
}
"""Where the tensors of an operand stand, below the name of its module."""


@dataclass(frozen=True)
class Form:
    """How an operand is quantized.

    Attributes:
        kind: Kind of the grid, a key of `TENSORS`.
        bits: Width of a code; 1 where the kind says so.
    """

    kind: str
    bits: int = 1

    @staticmethod
    def parse(text: object) -> "Form":
        """A form by its name in the file.

        Raises:
            ValueError: If there is no such form.
        """
        found = FORM.fullmatch(text) if isinstance(text, str) else None
        form = Form(found[1], int(found[2] or 1)) if found else Form("")
        wide = form.kind in ("s", "u", "token", "table")
        if form.kind not in TENSORS or not (2 if wide else 1) <= form.bits <= (16 if wide else 1):
            raise ValueError(f"unknown form {str(text)[:40]!r} of an operand")
        return form

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of its tensors."""
        return TENSORS[self.kind]

    @property
    def signed(self) -> bool:
        """Whether codes begin below zero."""
        return self.kind in ("s", "token")

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """Largest code."""
        return self.low + 2**self.bits - 1


@dataclass(frozen=True)
class Network:
    """The network of a file.

    Attributes:
        image: Channels, height and width in pixels.
        patch: Height and width of a patch.
        depth: Number of blocks.
        heads: Heads of an attention.
        prefix: Names of the tensors of tokens before those of patches.
        embed_prefix: Whether these have positions too.
        pool: `token`, the first token; `tokens`, the mean of the heads of the first two; `avg`,
            the mean of tokens.
        pool_prefix: Whether the mean counts the tokens before those of patches.
        eps: Of every LayerNorm, but those of `react` blocks.
        react_eps: Of these.
        react: Names of layers with normalization, shortcut and RPReLU.
        context: Names of attentions with a shortcut around the context.
        operands: For each module with quantized operands, the form of each.
    """

    image: tuple[int, int, int]
    patch: tuple[int, int]
    depth: int
    heads: int
    prefix: tuple[str, ...]
    embed_prefix: bool
    pool: str
    pool_prefix: bool
    eps: float
    react_eps: float
    react: tuple[str, ...]
    context: tuple[str, ...]
    operands: Mapping[str, Mapping[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return math.prod(
            side // part for side, part in zip(self.image[1:], self.patch, strict=True)
        )

    @staticmethod
    def from_dict(items: Mapping[str, Any]) -> "Network":
        """From plain data, every value checked.

        Raises:
            ValueError: If a value is missing, of the wrong type or out of range.
        """
        missing = [field.name for field in fields(Network) if field.name not in items]
        if missing:
            raise ValueError(f"the network says nothing of {missing[0]}")
        made = {field.name: items[field.name] for field in fields(Network)}
        for key, length in (("image", 3), ("patch", 2)):
            made[key] = _tuple(key, items[key], int)
            if len(made[key]) != length or not all(0 < n <= LARGEST_SIDE for n in made[key]):
                raise ValueError(f"{key} {_short(made[key])} of the network is out of range")
        for key in ("prefix", "react", "context"):
            made[key] = _tuple(key, items[key], str)
        for key in ("depth", "heads"):
            if type(items[key]) is not int or not 0 < items[key] <= LARGEST_SIDE:
                raise ValueError(f"{key} {_short(items[key])} of the network is out of range")
        for key in ("eps", "react_eps"):
            if type(items[key]) is not float or not 0 <= items[key] <= 1:
                raise ValueError(f"{key} {_short(items[key])} of the network is out of range")
        for key in ("embed_prefix", "pool_prefix"):
            if type(items[key]) is not bool:
                raise ValueError(f"{key} of the network is not true or false")
        if items["pool"] not in ("token", "tokens", "avg"):
            raise ValueError(f"unknown pooling {_short(items['pool'])} of the network")
        network = Network(**made)
        if not 0 < network.num_patches <= LARGEST_TOKENS:
            raise ValueError(f"the network has {network.num_patches} patches an image")
        _check_operands(network.operands)
        return network


def _check_operands(operands: object) -> None:
    if not isinstance(operands, dict):
        raise ValueError("the operands of the network are no mapping")
    for name, forms in operands.items():
        if not isinstance(forms, dict) or not set(forms) <= set(OPERANDS):
            raise ValueError(f"the operands of {_short(name)} are none: {_short(forms)}")
        for form in forms.values():
            Form.parse(form)


def _tuple(key: str, value: object, kind: type) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or any(type(item) is not kind for item in value):
        raise ValueError(f"{key} {_short(value)} of the network is no list of {kind.__name__}")
    return tuple(value)


def _short(value: object) -> str:
    return repr(value)[:60]

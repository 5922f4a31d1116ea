"""What a model expects its images to have gone through; travels with it, compared with the data.

Feeding a timm ViT images normalised for another model costs tens of points of accuracy and raises
no error, so a mismatch is refused here.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from timm.data.config import resolve_data_config
from torch import nn

INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming", "random")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
    """Evaluation preprocessing of a model, in timm's terms.

    Attributes:
        input_size: Channels, height and width in pixels.
        mean: Subtracted from pixels in [0, 1], one value a channel.
        std: Divided by after that, one value a channel.
        interpolation: Name of the resampling filter, such as `bicubic`.
        crop_pct: Side of the crop as a fraction of the resized image.
        crop_mode: timm's crop mode, usually `center`.

    Raises:
        ValueError: If a value is none that images can have.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    def __post_init__(self) -> None:
        sides, mean, std = self.input_size, self.mean, self.std
        if not all(side > 0 for side in sides):
            raise ValueError(f"input_size must be three positive integers, got {sides}")
        if not mean or not all(math.isfinite(value) for value in mean):
            raise ValueError(f"mean must be finite numbers, got {mean}")
        if not std or not all(0 < value < math.inf for value in std):
            raise ValueError(f"std must be positive numbers, got {std}")
        if not 0 < self.crop_pct <= 1.5:
            raise ValueError(f"crop_pct must be above 0 and at most 1.5, got {self.crop_pct}")
        for key, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            if (value := getattr(self, key)) not in known:
                raise ValueError(f"{key} must be one of {', '.join(known)}, got '{value}'")

    @staticmethod
    def from_dict(items: dict[str, Any]) -> "Preprocessing":
        """From plain data; lists become tuples."""
        tuples = {key: tuple(items[key]) for key in ("input_size", "mean", "std")}
        return Preprocessing(**{**items, **tuples})

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def of_model(model: nn.Module) -> Preprocessing:
    """The preprocessing of a timm model, from its pretrained configuration."""
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)  # type: ignore[arg-type]
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return Preprocessing.from_dict({key: config[key] for key in keys})


def check_transform(transform: Any, expected: Preprocessing) -> None:
    """Refuse an evaluation transform that does something else than the model expects.

    Compares what the transform really does: it is read step by step, and run once to see the size
    of its output.

    Args:
        transform: A `torchvision.transforms.Compose` from PIL image to tensor.
        expected: The model's preprocessing.

    Raises:
        ValueError: Naming the first setting that differs, both values and the way out.
    """
    channels = expected.input_size[0]
    steps = {type(step).__name__: step for step in transform.transforms}
    found: dict[str, Any] = {}
    if "Normalize" in steps:
        found["mean"] = _floats(steps["Normalize"].mean)
        found["std"] = _floats(steps["Normalize"].std)
    else:
        found["mean"], found["std"] = (0.0,) * channels, (1.0,) * channels
    _require_equal(found, expected)
    probe = Image.new("RGB" if channels == 3 else "L", (64, 48))
    found = {"input_size": tuple(transform(probe).shape)}
    if "Resize" in steps:
        found["interpolation"] = steps["Resize"].interpolation.value
        found["crop_pct"] = _crop_pct(steps["Resize"].size, expected)
    _require_equal(found, expected)


def _require_equal(found: dict[str, Any], expected: Preprocessing) -> None:
    for key, value in found.items():
        wanted = getattr(expected, key)
        if value != (_floats(wanted) if key in ("mean", "std") else wanted):
            setting = "img_size" if key == "input_size" else key
            raise ValueError(
                f"preprocessing mismatch: the model expects {key} {wanted}, the data pipeline uses "
                f"{value}; remove the data.{setting} setting so that it follows the model, or load "
                "the model that was trained with it"
            )


def _crop_pct(resized: int | tuple[int, ...], expected: Preprocessing) -> float:
    """The expected fraction where the image is resized as it asks, else the fraction found."""
    side = expected.input_size[-1]
    size = resized if isinstance(resized, int) else resized[-1]
    if size == math.floor(side / expected.crop_pct):
        return expected.crop_pct
    return round(side / size, 4)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in torch.as_tensor(values).flatten())

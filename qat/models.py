"""Build a timm model by name, in a way that a checkpoint can repeat."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, load_state_dict
from torch import Tensor, nn

from qat.card import Card, Start, amend, expected_by, start_of
from qat.plan import nearest
from qat.preprocessing import Preprocessing, of_model


def timm_model(
    name: str,
    *,
    num_classes: int | None = None,
    img_size: int | None = None,
    in_chans: int = 3,
    weights: str | None = None,
    pretrained: bool = False,
    data_config: dict[str, Any] | None = None,
    model_args: dict[str, Any] | None = None,
) -> nn.Module:
    """A timm model with a card.

    Args:
        name: timm's model name, such as `vit_tiny_patch16_224`.
        num_classes: Size of the classifier; None keeps the model's own, and that of `weights`.
        img_size: Side of the image in pixels; None keeps the model's own. Position embeddings of
            `weights` are interpolated.
        in_chans: Channels of the image.
        weights: File of float weights (safetensors or weights-only torch file). A classifier of
            another size than `num_classes` is left at its random start.
        pretrained: Load timm's weights from the hub instead.
        data_config: Preprocessing that differs from timm's, such as `{crop_pct: 1.0}`.
        model_args: Further arguments of the timm model, such as `{depth: 2}`.

    Raises:
        ValueError: If timm has no such model, or `weights` is missing, broken or of another model.
    """
    if name.split(".")[0] not in timm.list_models():
        raise ValueError(f"timm has no model '{name}'" + nearest(name, timm.list_models()))
    data_config, model_args = copy.deepcopy(data_config), copy.deepcopy(model_args)
    overlay: dict[str, Any] = dict(data_config or {})
    if img_size is not None:
        overlay["input_size"] = (in_chans, img_size, img_size)
    elif in_chans != 3:
        raise ValueError(f"in_chans is {in_chans}: state img_size as well")
    if in_chans != 3:
        config = get_pretrained_cfg(name)
        for key in ("mean", "std"):  # a channel gets the mean of those that timm states
            overlay.setdefault(key, (fmean(getattr(config, key)),) * in_chans)
    arguments = dict(model_args or {})
    if img_size is not None:
        arguments["img_size"] = img_size
    if weights is not None:
        overlay |= _weights_overlay(name, weights)
        # Loading is strict only for the file's own classifier; another one replaces it below.
        arguments["num_classes"] = overlay["num_classes"]
    elif num_classes is not None:
        arguments["num_classes"] = num_classes
    try:
        model = timm.create_model(
            name,
            pretrained=pretrained or weights is not None,
            pretrained_cfg_overlay=overlay,
            in_chans=in_chans,
            **arguments,
        )
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()
        raise ValueError(
            f"cannot build '{name}'{f' from {weights}' if weights else ''}: "
            f"{' '.join(line.strip() for line in reason[:3])[:300]}; is the file of another model, "
            "or an argument of another architecture?"
        ) from None
    if num_classes is not None and num_classes != num_classes_of(model):
        model.reset_classifier(num_classes)  # type: ignore[operator]
    recipe = {
        "name": name,
        "num_classes": model.num_classes,
        "img_size": img_size,
        "in_chans": in_chans,
        "data_config": data_config,
        "model_args": model_args,
    }
    start = _start(model, pretrained or weights is not None, overlay)
    amend(model, recipe=recipe, preprocessing=of_model(model), start=start)
    return model


def adopt(
    model: nn.Module,
    *,
    recipe: Mapping[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] | None = None,
) -> nn.Module:
    """Give a card to any model: of `timm.create_model`, torchvision, transformers, or your own.

    Args:
        model: The model; it is changed in nothing else.
        recipe: How to build it, which `qat.save` needs: arguments of `timm_model`, or a mapping of
            `class_path` and `init_args` that names a builder and its arguments.
        preprocessing: What its images have gone through; None takes that of a timm model.
        class_names: Names of its classes, in the order of its outputs.

    Returns:
        The model.
    """
    if preprocessing is None and hasattr(model, "pretrained_cfg"):
        preprocessing = of_model(model)
    names = None if class_names is None else tuple(class_names)
    amend(model, recipe=recipe, preprocessing=preprocessing, class_names=names)
    return model


def _start(model: nn.Module, has_weights: bool, overlay: Mapping[str, Any]) -> Start | None:
    """What weights did not reach: all of a model, or a classifier of another size."""
    config: Any = model.pretrained_cfg
    names = config["classifier"]
    classifier = names if isinstance(names, str) else (names or ("",))[0]
    if not has_weights:
        return start_of(model, f"every layer, with its classifier '{classifier}'")
    if num_classes_of(model) in (0, overlay.get("num_classes", config["num_classes"])):
        return None
    return start_of(model, f"its classifier '{classifier}'", classifier)


def _weights_overlay(name: str, weights: str) -> dict[str, Any]:
    """Point timm at a local file, and tell it the size of the classifier in there."""
    if not Path(weights).is_file():
        raise ValueError(f"no weights file '{weights}'; if it is an asset, is LOWBIT_ASSETS set?")
    try:
        state = load_state_dict(weights, weights_only=True)
    except Exception as error:
        raise ValueError(f"weights file '{weights}' cannot be read: {error}") from None
    config = get_pretrained_cfg(name)
    classifier = config.classifier if config is not None else None
    classifier = classifier if isinstance(classifier, str) else (classifier or (None,))[0]
    head = state.get(f"{classifier}.weight")
    if head is None:
        raise ValueError(
            f"weights file '{weights}' has no '{classifier}.weight', so it is not of '{name}'; "
            "name the model that it was saved from"
        )
    # Older timm would read the file of a model with custom weights in that custom format.
    return {"file": weights, "custom_load": False, "num_classes": head.shape[0]}


def example_inputs(model: nn.Module, device: str = "cpu") -> tuple[Tensor, ...]:
    """Inputs of one image for a model of ours: its own, or an image of zeros."""
    if hasattr(model, "example_inputs"):
        return model.example_inputs(device)  # type: ignore[operator]
    return (torch.zeros(1, *expected_by(model).input_size, device=device),)


def has_example(model: nn.Module) -> bool:
    """Whether a model says what its inputs look like."""
    card = getattr(model, "card", Card())
    return hasattr(model, "example_inputs") or card.preprocessing is not None


def num_classes_of(model: nn.Module) -> int:
    """Size of the classifier of a timm model."""
    return int(model.num_classes)  # type: ignore[arg-type]

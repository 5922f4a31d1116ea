"""Build a timm model by name, in a way that a checkpoint can repeat."""

import copy
import sys
from collections.abc import Mapping
from inspect import isclass, signature
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import timm
import torch
from timm.models import (
    build_model_with_cfg,
    get_pretrained_cfg,
    load_pretrained,
    load_state_dict,
)
from torch import Tensor, nn

from qat.card import Card, Start, amend, card_of, expected_by, start_of
from qat.plan import nearest
from qat.preprocessing import of_model


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
    _require_model(name)
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


def timm_recipe(model: nn.Module, before: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Arguments of `timm_model` that may build a model; None if it is none of timm's.

    Args:
        model: The model as it is now.
        before: How it was built.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") if isinstance(config, Mapping) else None
    if (before is not None and "name" not in before) or not (before or name):
        return None
    recipe = {"name": name, "img_size": None, "in_chans": 3, "data_config": None, **(before or {})}
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or (None, None)
    if height is not None and height == width and height != config.get("input_size", (0,))[-1]:
        recipe["img_size"] = height
    return {"model_args": None, **recipe, "num_classes": num_classes_of(model)}


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
        raise ValueError(_without_head(name, weights, f"{classifier}.weight", state))
    # Older timm would read the file of a model with custom weights in that custom format.
    return {"file": weights, "custom_load": False, "num_classes": head.shape[0]}


def _require_model(name: str) -> None:
    if name.split(".")[0] not in timm.list_models():
        raise ValueError(f"timm has no model '{name:.80}'" + nearest(name, timm.list_models()))


def architecture_arguments(name: str) -> frozenset[str]:
    """Names of the arguments that shape a timm model, and do nothing else.

    They are those of the classes that its timm module works with, without what steers the building:
    weights to load, configurations, files, devices.

    Raises:
        ValueError: If timm has no such model.
    """
    _require_model(name)
    entry = timm.models.model_entrypoint(name)
    module = sys.modules[entry.__module__]
    classes = {kind for found in vars(module).values() if isclass(found) for kind in found.__mro__}
    modules = [kind for kind in classes if issubclass(kind, nn.Module)]
    steering = chain.from_iterable(
        signature(function).parameters
        for function in (timm.create_model, build_model_with_cfg, load_pretrained)
    )
    known = chain.from_iterable(signature(kind.__init__).parameters for kind in modules)
    return frozenset(known) - frozenset(steering) - {"self", "device", "dtype"}


def _without_head(name: str, weights: str, head: str, state: Mapping[str, Any]) -> str:
    """What to say of weights that lack the classifier of a model."""
    with torch.device("meta"):
        own = timm.create_model(name).state_dict().keys()
    lacking = f"weights file '{weights}' has no '{head}'"
    if len(own & state.keys()) > len(own) / 2:
        return (
            f"{lacking}: it holds the features of '{name}' without a classifier, as DINO and MAE "
            f"publish them; timm.create_model('{name}', num_classes=0) reads it by load_state_dict,"
            " then reset_classifier and qat.adopt(model)"
        )
    if any(key.startswith("model.") for key in state):
        return (
            f"{lacking}, its names begin with 'model.': a Lightning checkpoint; strip that from "
            "the names, or give it as ckpt_path if this program wrote it"
        )
    return f"{lacking}, and few names of '{name}'; name the model that it was saved from"


def example_inputs(model: nn.Module, device: str = "cpu") -> tuple[Tensor, ...]:
    """Inputs of one image for a model of ours: its own, or an image of zeros."""
    if hasattr(model, "example_inputs"):
        return model.example_inputs(device)  # type: ignore[operator]
    size, dtype = expected_by(model).input_size, card_of(model).dtype
    return (torch.zeros(1, *size, device=device, dtype=dtype),)


def has_example(model: nn.Module) -> bool:
    """Whether a model says what its inputs look like."""
    card = getattr(model, "card", Card())
    return hasattr(model, "example_inputs") or card.preprocessing is not None


def num_classes_of(model: nn.Module) -> int:
    """Size of the classifier.

    Raises:
        ValueError: If neither the model nor its card says.
    """
    if hasattr(model, "num_classes"):
        return int(model.num_classes)  # type: ignore[arg-type]
    names = getattr(model, "card", Card()).class_names
    if names is None:
        raise ValueError(
            "the model does not say how many classes it has; name them with "
            "qat.adopt(model, class_names=...)"
        )
    return len(names)

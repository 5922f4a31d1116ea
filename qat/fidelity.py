"""What is saved is what will be loaded: a model is compared with what its card builds.

The card's recipe is built again without memory. Every module has to be of the same class, with
parameters of the same shapes and settings of the same values. So a classifier that was replaced, or
an image size that was changed, is found when the model is saved, not when it is needed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

from torch import Tensor, nn

from qat.archive import require_bounded
from qat.card import Card, amend, card_of, expected_by, untrained
from qat.manifest import Manifest, selected, written
from qat.models import timm_recipe
from qat.preprocessing import Preprocessing, of_model
from qat.quantizers import Phase, quantizers
from qat.rebuild import rebuilt
from qat.spec import QuantSpec

ADVICE = (
    "if the model was changed after it was built, call qat.adopt(model), or build it as it is with "
    "qat.timm_model; for any other say how it is built: qat.adopt(model, recipe={'class_path': "
    "'your_package.build', 'init_args': {...}})"
)
UNSAVED = ("training", "grad_checkpointing", "fused_attn", "p")
"""Attributes that change how a module computes or is trained, not what it answers."""


def adopt(
    model: nn.Module,
    *,
    recipe: Mapping[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: tuple[str, ...] | list[str] | None = None,
) -> nn.Module:
    """Give a card to any model: of `timm.create_model`, torchvision, transformers, or your own.

    Args:
        model: The model; it is changed in nothing else.
        recipe: How to build it, which `qat.save` needs: arguments of `qat.timm_model`, or a mapping
            of `class_path` and `init_args` that names a builder and its arguments. None finds that
            of a timm model whose further arguments have their defaults.
        preprocessing: What its images have gone through; None takes that of a timm model.
        class_names: Names of its classes, in the order of its outputs.

    Returns:
        The model.

    Raises:
        ValueError: If the recipe builds another model.
    """
    before = getattr(model, "card", None) or Card()
    found = recipe if recipe is not None else timm_recipe(model, before.recipe)
    if preprocessing is None:
        preprocessing = before.preprocessing
        if preprocessing is None and hasattr(model, "pretrained_cfg"):
            preprocessing = of_model(model)
    if preprocessing is not None and found is not None and (side := found.get("img_size")):
        preprocessing = replace(preprocessing, input_size=(preprocessing.input_size[0], side, side))
    names = before.class_names if class_names is None else tuple(class_names)
    amend(model, preprocessing=preprocessing, class_names=names, recipe=found)
    if found is not None and preprocessing is not None:
        try:
            require_loadable(model)
        except ValueError:
            amend(model, recipe=None)
            if recipe is not None:
                raise
    return model


def manifest(
    model: nn.Module, state: dict[str, Any], prefix: str = "", **more: Any
) -> dict[str, Any]:
    """What rebuilds `model` around the tensors `state`.

    Args:
        model: A model with a card, converted or not.
        state: State dictionary that goes into the same file.
        prefix: Prefix of the model's keys in `state`, such as `model.`.
        more: Further fields.

    Raises:
        ValueError: If the model's card lacks the recipe, or its factories cannot be named.
    """
    card = card_of(model)
    expected_by(model)
    if card.recipe is None:
        raise ValueError(
            "the model's card does not say how it is built, so a checkpoint could not rebuild it; "
            + ADVICE
        )
    card = card if untrained(model) else replace(card, start=None)
    return written(card, selected(state, prefix), prefix, **more)


def require_loadable(model: nn.Module) -> None:
    """Refuse a model of which a checkpoint would not make the same again.

    Raises:
        ValueError: If its card does not say how it is built, or builds something else.
    """
    state = owned(model.state_dict())
    require_same_model(manifest(model, state), state, model)


def require_usable(model: nn.Module) -> None:
    """Refuse quantizers without a grid, and models of which only a part quantizes.

    Raises:
        ValueError: Naming the first.
    """
    phases: dict[Phase, str] = {}
    for name, quantizer in quantizers(model):
        phases.setdefault(quantizer.phase, name)
        try:
            quantizer.require_usable()
        except ValueError as error:
            raise ValueError(f"quantizer '{name}': {error}; calibrate the model again") from None
    if len(phases) > 1 or Phase.OBSERVE in phases:
        said = ", ".join(f"'{name}' is in phase {phase}" for phase, name in phases.items())
        raise ValueError(f"its quantizers are not all of one phase ({said}); calibrate them all")


def owned(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state whose tensors hold no more than their values, by the names of uncompiled modules."""
    return {_plain_name(name): _own(value) for name, value in state.items()}


def require_same_model(content: dict[str, Any], state: dict[str, Any], model: nn.Module) -> None:
    """Refuse a model that is not what its manifest builds.

    Args:
        content: The manifest.
        state: The model's tensors, as `owned` gives them.
        model: The model.

    Raises:
        ValueError: Naming the first module that differs.
    """
    own = tuple(path.partition(".")[0] for path in _named_in(content))
    try:
        again = rebuilt(Manifest.of(content), state, require_bounded(state), own)
    except ValueError as error:
        raise ValueError(f"a checkpoint could not rebuild the model: {error}; {ADVICE}") from None
    theirs = dict(again.named_modules())
    for name, module in model.named_modules():
        module, name = getattr(module, "_orig_mod", module), _plain_name(f"{name}.")[:-1]
        if type(theirs.get(name)).__name__ != type(module).__name__:
            raise ValueError(
                f"'{name}' is a {type(module).__name__}, the model's card builds a "
                f"{type(theirs.get(name)).__name__}; {ADVICE}"
            )
        for key, value in _settings(module).items():
            if (other := vars(theirs[name]).get(key, value)) != value:
                raise ValueError(
                    f"'{name}' has {key} {value!s:.80}, the model's card builds {other!s:.80}; "
                    f"{ADVICE}"
                )


def _settings(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module that say what it answers."""
    plain = bool | int | float | str | tuple | Enum | QuantSpec
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, plain) and not (key.startswith("_") or key in UNSAVED or "drop" in key)
    }


def _plain_name(name: str) -> str:
    """A name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def _own(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    whole = value.numel() * value.itemsize == value.untyped_storage().nbytes()
    return value if whole and value.is_contiguous() else value.detach().clone().contiguous()


def _named_in(data: Any) -> Iterator[str]:
    """Every class path in plain data."""
    if isinstance(data, Mapping):
        if isinstance(path := data.get("class_path"), str):
            yield path
        data = list(data.values())
    if isinstance(data, list | tuple):
        for item in data:
            yield from _named_in(item)

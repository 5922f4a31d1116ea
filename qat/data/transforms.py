"""What training images go through before a model."""

from collections.abc import Mapping
from typing import Any

from timm.data.transforms_factory import create_transform


def augmented(settings: Mapping[str, Any], augment: Mapping[str, Any]) -> Any:
    """A transform of training images, by arguments of `timm.data.create_transform`.

    Raises:
        ValueError: If there is no such argument.
    """
    kept = {key: value for key, value in settings.items() if not key.startswith("crop_")}
    try:
        return create_transform(**kept, is_training=True, **augment)
    except TypeError as error:
        raise ValueError(
            f"data.augment: {error}; see the arguments of timm.data.create_transform"
        ) from None

"""An ONNX file of ours as a module of torch, which is evaluated as any other."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat.card import Conversion, amend
from qat.export.onnx_file import OnnxModel
from qat.manifest import Manifest


class OnnxClassifier(nn.Module):
    """A classifier that ONNX Runtime runs, with the card of the model that was exported.

    Args:
        path: The file.

    Attributes:
        costs: What the file says of the costs of the model.

    Raises:
        ValueError: If it is none of ours, says too little, or takes more than images.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.model = OnnxModel(path)
        if len(self.model.inputs) != 1:
            raise ValueError(
                f"'{path}' takes {', '.join(self.model.inputs)}; only a file that takes images "
                "alone can be tested and predicted with"
            )
        try:
            self.costs: dict[str, Any] = dict(self.model.texts["costs"])
            shape = self.model.proto.graph.output[0].type.tensor_type.shape
            self.num_classes = int(shape.dim[-1].dim_value)
            unbuilt = {"model": {}, "versions": {}}  # a model that no recipe builds
            amend(self, **_card(Manifest.of_card(unbuilt | self.model.texts["card"])))
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(
                f"ONNX file '{path}' does not say what model it holds ({error!s:.160})"
            ) from None

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch c"]:
        """Logits."""
        return torch.from_numpy(self.model(images.cpu().numpy())).to(images.device)


def _card(data: Manifest) -> dict[str, Any]:
    """Fields of the model's card."""
    conversion = data.conversion and Conversion(*data.converting(()), {})
    return {
        "recipe": data.recipe or None,
        "preprocessing": data.preprocessing,
        "class_names": data.class_names,
        "conversion": conversion,
        "start": data.start,
    }

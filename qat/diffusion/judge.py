"""A small convolutional classifier of digits: an independent judge of generated ones."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from qat.card import amend, start_of
from qat.preprocessing import Preprocessing


class Judge(nn.Module):
    """Two convolutions and two layers; its penultimate features also measure distributions.

    Args:
        img_size: Side of the image in pixels, a multiple of four.
        width: Channels of the first convolution.
        num_features: Width of the penultimate layer.
        num_classes: Classes.
    """

    def __init__(
        self, img_size: int, width: int = 16, num_features: int = 32, num_classes: int = 10
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.fc = nn.Linear(2 * width * (img_size // 4) ** 2, num_features)
        self.head = nn.Linear(num_features, num_classes)

    def forward_features(self, x: Float[Tensor, "batch 1 h w"]) -> Float[Tensor, "batch features"]:
        """Features before the classifier."""
        for conv in (self.conv1, self.conv2):
            x = nn.functional.max_pool2d(conv(x).relu(), 2)
        return self.fc(x.flatten(1)).relu()

    def forward(self, x: Float[Tensor, "batch 1 h w"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.head(self.forward_features(x))


def judge(**arguments: Any) -> Judge:
    """A judge with a card: grey pixels in [-1, 1].

    Args:
        arguments: Those of `Judge`.
    """
    model = Judge(**arguments)
    recipe = {"class_path": "qat.diffusion.judge.judge", "init_args": arguments}
    size = (1, arguments["img_size"], arguments["img_size"])
    pixels = Preprocessing(size, (0.5,), (0.5,), "bicubic", 1.0, "center")
    amend(model, recipe=recipe, preprocessing=pixels, start=start_of(model, "every layer"))
    return model

"""A packed model at work: a vision transformer in NumPy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qat.packed import Packed
from qat.packed.network import Network
from qat.reading import read_file
from qat.runtime.blocks import Block, Norm, norm_or_none
from qat.runtime.grids import See, unseen
from qat.runtime.images import Images
from qat.runtime.layers import Layer, Parts
from qat.runtime.operations import Operations


class Prediction(NamedTuple):
    """The answer for one image.

    Attributes:
        name: Name of the most likely class, its number where the file names none.
        confidence: Its softmax probability.
        index: Its number.
    """

    name: str
    confidence: float
    index: int


class Model:
    """A packed model.

    Args:
        packed: What the file holds.
        operations: The table of operations.

    Raises:
        ValueError: If tensors are missing, or of other shapes than the network demands.
    """

    def __init__(self, packed: Packed, operations: Operations) -> None:
        self.card, self.network = packed.card, Network.from_dict(packed.network)
        network = self.network
        parts = Parts.of(packed, network, operations)
        self.grids = parts.grids
        self.softmax = operations["softmax"]
        channels = network.image[0]
        width = channels * network.patch[0] * network.patch[1]
        self.patches = Layer(parts, "patch_embed.proj", width, (channels, 1, 1), self._to_patches)
        self.dim = dim = self.patches.num_outputs
        self.prefix = [
            parts.vector(name, packed.tensors[name].size).reshape(1, -1, dim)
            for name in network.prefix
        ]
        num_prefix = sum(part.shape[1] for part in self.prefix)
        self.num_prefix = num_prefix
        positions = network.num_patches + (num_prefix if network.embed_prefix else 0)
        found = parts.optional("pos_embed", positions * dim)
        self.positions = None if found is None else found.reshape(1, positions, dim)
        self.norm_pre = norm_or_none(parts, "norm_pre", dim, network.eps)
        self.blocks = [Block(parts, network, f"blocks.{i}", dim) for i in range(network.depth)]
        self.norm: Norm | None = norm_or_none(parts, "norm", dim, network.eps)
        self.pooled_norm = norm_or_none(parts, "fc_norm", dim, network.eps)
        names = ("head", "head_dist") if network.pool == "tokens" else ("head",)
        self.heads = [Layer(parts, name, dim) for name in names]
        self.num_pooled = None if network.pool == "avg" else len(names)

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes; their numbers where the file names none."""
        names = self.card.get("class_names") or range(self.heads[0].num_outputs)
        return [str(name) for name in names]

    @property
    def images(self) -> Images:
        """What its images go through.

        Raises:
            ValueError: If the card states nothing that this runtime knows.
        """
        return Images.of_card(self.card, self.network.image)

    def __call__(self, x: np.ndarray, see: See = unseen) -> np.ndarray:
        """Logits (batch, classes) of preprocessed images.

        Args:
            x: Images (batch, channels, height, width) in float32.
            see: Is shown the input of every grid, by the grid's name.

        Raises:
            ValueError: If the images have another shape or type.
        """
        if x.ndim != 4 or x.shape[1:] != self.network.image or x.dtype != np.float32:
            raise ValueError(
                f"the model takes float32 images of shape (batch, "
                f"{', '.join(map(str, self.network.image))}), got {x.dtype} of {x.shape}"
            )
        tokens = self._tokens(x, see)
        for block in self.blocks[:-1]:
            tokens = block(tokens, see, tokens.shape[1])
        tokens = self.blocks[-1](tokens, see, self.num_pooled or tokens.shape[1])
        if self.norm is not None:
            tokens = self.norm(tokens)
        return self._head(tokens, see)

    def predict(self, paths: Sequence[str | Path]) -> list[Prediction]:
        """The most likely class of each image file, and its confidence.

        Raises:
            ValueError: If a file cannot be read as an image, or the card states no preprocessing.
        """
        names, found = self.class_names, []
        for path in paths:
            confidences = self.softmax(self(self.images.prepare(read_file(path))[None]))[0]
            best = int(confidences.argmax())
            found.append(Prediction(names[best], float(confidences[best]), best))
        return found

    def _to_patches(self, x: np.ndarray) -> np.ndarray:
        """Patches (batch, patches, channels * height * width) of images."""
        batch, channels, height, width = x.shape
        high, wide = self.network.patch
        rows, columns = height // high, width // wide
        x = x[:, :, : rows * high, : columns * wide]
        x = x.reshape(batch, channels, rows, high, columns, wide).transpose(0, 2, 4, 1, 3, 5)
        return np.ascontiguousarray(x).reshape(batch, rows * columns, channels * high * wide)

    def _tokens(self, x: np.ndarray, see: See) -> np.ndarray:
        """Tokens of images, with their positions."""
        tokens = self.patches(x, see)
        if self.positions is not None and not self.network.embed_prefix:
            tokens = tokens + self.positions
        prefix = [np.broadcast_to(part, (len(x), *part.shape[1:])) for part in self.prefix]
        tokens = np.concatenate([*prefix, tokens], 1)
        if self.positions is not None and self.network.embed_prefix:
            tokens = tokens + self.positions
        return tokens if self.norm_pre is None else self.norm_pre(tokens)

    def _head(self, tokens: np.ndarray, see: See) -> np.ndarray:
        """Logits of tokens."""
        if self.network.pool == "avg":
            first = 0 if self.network.pool_prefix else self.num_prefix
            pooled = [tokens[:, first:].mean(1, dtype=np.float64).astype(np.float32)]
        else:
            pooled = [np.ascontiguousarray(tokens[:, i]) for i in range(len(self.heads))]
        if self.pooled_norm is not None:
            pooled = [self.pooled_norm(one) for one in pooled]
        logits: Any = sum(head(x, see) for head, x in zip(self.heads, pooled, strict=True))
        return logits / np.float32(len(self.heads))

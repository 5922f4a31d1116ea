"""A diffusion transformer (DiT) for small images, of timm's attention and MLP.

Peebles and Xie, ICCV 2023, https://arxiv.org/abs/2212.09748. With c the sum of the embeddings of
time and class, and with gates a and modulations g, b that are linear in c and zero at first
(adaLN-zero), each block computes

    h <- h + a1 attention(norm(h) (1 + g1) + b1)
    h <- h + a2 mlp(norm(h) (1 + g2) + b2)
"""

import math
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "identity": nn.Identity}
Activation = Literal["gelu", "relu", "silu", "identity"]


class TimeEmbed(nn.Module):
    """Embedding of a time step: sines and cosines, then two layers.

    Args:
        dim: Width.
    """

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half) / (half - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = Mlp(dim, dim, dim)

    def forward(self, times: Int[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Embed time steps, which are whole numbers."""
        angles = times[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], 1))


class Modulation(nn.Sequential):
    """Gates, scales and shifts as functions of the condition; zero at first.

    Args:
        dim: Width.
        num_vectors: How many vectors of that width it gives.
        act: Activation before the linear layer.
    """

    def __init__(self, dim: int, num_vectors: int, act: Activation) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]()
        self.linear = nn.Linear(dim, num_vectors * dim)
        self.num_vectors = num_vectors
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition: Float[Tensor, "batch dim"]) -> tuple[Tensor, ...]:
        """The vectors, each (batch, 1, dim)."""
        return self.linear(self.act(condition))[:, None].chunk(self.num_vectors, -1)


class DiTBlock(nn.Module):
    """Attention and MLP, modulated by the condition.

    Args:
        dim: Width.
        num_heads: Heads of attention.
        head_dim: Width of a head; None divides `dim` among them.
        mlp_ratio: Width of the hidden layer over `dim`.
        act: Activation of the MLP.
        modulation_act: Activation before the modulation.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None,
        mlp_ratio: float,
        act: Activation,
        modulation_act: Activation,
    ) -> None:
        super().__init__()
        # Older timm knows no width of a head; it is named only where it is needed.
        width: dict[str, Any] = {} if head_dim is None else {"attn_head_dim": head_dim}
        self.modulation = Modulation(dim, 6, modulation_act)
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attn = Attention(dim, num_heads, qkv_bias=True, **width)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=ACTIVATIONS[act])

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], condition: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Tokens after both residual branches."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(condition)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Predicts the noise in an image from the image, the time step and the class.

    Args:
        img_size: Side of the image in pixels.
        patch_size: Side of a patch.
        in_chans: Channels of the image.
        dim: Width.
        depth: Number of blocks.
        num_heads: Heads of attention.
        num_classes: Classes.
        head_dim: Width of a head; None divides `dim` among them.
        mlp_ratio: Width of the hidden layer over `dim`.
        act: Activation of the MLP.
        modulation_act: Activation before the modulations.
        null_class: Whether there is one more class, `num_classes`, that stands for none; sampling
            with guidance needs it.

    Raises:
        ValueError: If patches do not tile the image, or the width is odd.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int = 4,
        in_chans: int = 1,
        dim: int = 64,
        depth: int = 3,
        num_heads: int = 4,
        num_classes: int = 10,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        act: Activation = "gelu",
        modulation_act: Activation = "silu",
        null_class: bool = True,
    ) -> None:
        super().__init__()
        if img_size % patch_size or dim % 2:
            raise ValueError(
                f"patch_size {patch_size} must divide img_size {img_size}, and dim {dim} must be "
                "even"
            )
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.num_classes, self.null_class = num_classes, null_class
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, dim)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.patch_embed.num_patches, dim))
        self.time_embed = TimeEmbed(dim)
        self.label_embed = nn.Embedding(num_classes + null_class, dim)
        self.blocks = nn.ModuleList(
            DiTBlock(dim, num_heads, head_dim, mlp_ratio, act, modulation_act) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = Modulation(dim, 2, modulation_act)
        self.head = nn.Linear(dim, patch_size * patch_size * in_chans)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        x: Float[Tensor, "batch channels side side"],
        times: Int[Tensor, " batch"],
        labels: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels side side"]:
        """The noise in noisy images.

        Args:
            x: Noisy images.
            times: Time step of each, 0 to the last of the schedule.
            labels: Class of each; `num_classes` is none, where there is such a class.
        """
        condition = self.time_embed(times) + self.label_embed(labels)
        tokens = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, condition)
        scale, shift = self.modulation(condition)
        return self._image(self.head(self.norm(tokens) * (1 + scale) + shift))

    def no_weight_decay(self) -> set[str]:
        """Parameters that never decay."""
        return {"pos_embed", "label_embed.weight"}

    def example_inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of one image, of zeros; what costs are counted on."""
        zero = torch.zeros(1, dtype=torch.long, device=device)
        shape = (1, self.in_chans, self.img_size, self.img_size)
        return torch.zeros(shape, device=device), zero, zero

    def _image(self, tokens: Float[Tensor, "batch tokens pixels"]) -> Tensor:
        """Patches back in their places; i and j are row and column of a pixel in its patch."""
        pattern = "batch (h w) (i j channels) -> batch channels (h i) (w j)"
        side, patch = self.img_size // self.patch_size, self.patch_size
        return rearrange(tokens, pattern, h=side, i=patch, j=patch)

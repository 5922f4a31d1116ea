"""Twins of timm's attention modules in which both products and the softmax output are visible.

With fused attention the two products and the softmax are inside one function call that no swap of
child modules can reach. The twins take over the float module's parameters under their own names.
While both products are in float they call exactly what timm calls, and so give the same bits.
"""

from einops import rearrange, repeat
from jaxtyping import Float
from timm.layers.attention import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from qat.layers import QuantMatmul
from qat.quantizers import Phase

ContextModule = nn.Module
"""Called as `context(x, q, k, v)` on the output of the second product, (batch, heads, tokens,
head_dim) each; returns the same shape."""


def heads(qkv: Float[Tensor, "batch tokens dims"], num_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values (batch, heads, tokens, head_dim) from one layer's output."""
    pattern = "batch tokens (three heads dim) -> three batch heads tokens dim"
    return rearrange(qkv, pattern, three=3, heads=num_heads).unbind(0)


class QuantAttention(nn.Module):
    """timm's `Attention` (ViT, DeiT) with quantizable products.

    Args:
        attention: The float module.
        qk: Product of queries and keys.
        av: Product of the attention map and the values.
        context: Optional module applied to the context while quantizing, see `ContextModule`.
    """

    def __init__(
        self,
        attention: Attention,
        qk: QuantMatmul,
        av: QuantMatmul,
        context: ContextModule | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.scale = attention.scale
        self.fused_attn = attention.fused_attn
        self.qkv = attention.qkv
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.attn_drop = attention.attn_drop
        self.norm = attention.norm
        self.gate = getattr(attention, "gate", None)  # added to timm in the course of 1.0
        self.proj, self.proj_drop = attention.proj, attention.proj_drop
        self.qk, self.av = qk, av
        self.context = context

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "batch tokens dim_out"]:
        """Self-attention.

        Args:
            x: Tokens.
            attn_mask: Additive mask of the attention logits.
            is_causal: Must be False; vision models attend to all tokens.

        Raises:
            ValueError: If a causal mask is asked for.
        """
        if is_causal:
            raise ValueError("QuantAttention has no causal form; pass the mask as `attn_mask`")
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        q, k, v = heads(self.qkv(x), self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.qk.phase is self.av.phase is Phase.FLOAT:
            x = self._float(q, k, v, attn_mask)
        else:
            logits = self.qk(q, k) * self.scale
            logits = logits if attn_mask is None else logits + attn_mask
            x = self.av(self.attn_drop(logits.softmax(-1)), v)
            if self.context is not None and self.av.phase is Phase.QUANTIZE:
                x = self.context(x, q, k, v)
        x = self.norm(rearrange(x, "batch heads tokens dim -> batch tokens (heads dim)"))
        x = x if gate is None else x * gate
        return self.proj_drop(self.proj(x))

    def _float(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.fused_attn:
            drop = self.attn_drop.p if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        logits = (q * self.scale) @ k.transpose(-2, -1)
        logits = logits if mask is None else logits + mask
        return self.attn_drop(logits.softmax(-1)) @ v


class QuantWindowAttention(nn.Module):
    """timm's `WindowAttention` (Swin) with quantizable products.

    Args:
        attention: The float module.
        qk: Product of queries and keys.
        av: Product of the attention map and the values.
    """

    relative_position_index: Tensor

    def __init__(self, attention: WindowAttention, qk: QuantMatmul, av: QuantMatmul) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.window_area = attention.window_area
        self.fused_attn = attention.fused_attn
        self.relative_position_bias_table = attention.relative_position_bias_table
        index = attention.relative_position_index
        self.register_buffer("relative_position_index", index, persistent=False)  # type: ignore[arg-type]
        self.qkv, self.attn_drop = attention.qkv, attention.attn_drop
        self.proj, self.proj_drop = attention.proj, attention.proj_drop
        self.qk, self.av = qk, av

    def forward(
        self,
        x: Float[Tensor, "windows tokens dim"],
        mask: Float[Tensor, "kinds tokens tokens"] | None = None,
    ) -> Float[Tensor, "windows tokens dim"]:
        """Self-attention within windows.

        Args:
            x: Tokens of every window of every image.
            mask: 0 or -inf, one mask for each window of an image; None where none is shifted.
        """
        q, k, v = heads(self.qkv(x), self.num_heads)
        bias = self._position_bias()
        if mask is not None:
            images = len(x) // len(mask)
            shifted = repeat(mask, "windows q k -> (images windows) 1 q k", images=images)
        else:
            shifted = None
        in_float = self.qk.phase is self.av.phase is Phase.FLOAT
        if in_float and self.fused_attn:
            bias = bias if shifted is None else bias + shifted
            drop = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
        else:
            if in_float:
                logits = (q * self.scale) @ k.transpose(-2, -1)
            else:
                logits = self.qk(q, k) * self.scale
            logits = logits + bias
            logits = logits if shifted is None else logits + shifted
            x = self.av(self.attn_drop(logits.softmax(-1)), v)
        x = rearrange(x, "windows heads tokens dim -> windows tokens (heads dim)")
        return self.proj_drop(self.proj(x))

    def _position_bias(self) -> Float[Tensor, "1 heads tokens tokens"]:
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = rearrange(bias, "(q k) heads -> 1 heads q k", q=self.window_area)
        return bias.contiguous()

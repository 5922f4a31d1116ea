"""Twins of timm's attention modules in which both products and the softmax output are visible.

With fused attention the two products and the softmax are inside one function call that no swap of
child modules can reach. The twins take over the float module's parameters under their own names.
While both products are in float they call exactly what timm calls, and so give the same bits.
"""

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
        batch, tokens, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.qk.phase is self.av.phase is Phase.FLOAT:
            x = self._float(q, k, v, attn_mask)
        else:
            logits = self.qk(q, k) * self.scale
            logits = logits if attn_mask is None else logits + attn_mask
            x = self.av(self.attn_drop(logits.softmax(-1)), v)
            if self.context is not None and self.av.phase is Phase.QUANTIZE:
                x = self.context(x, q, k, v)
        x = self.norm(x.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))
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
        windows, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(windows, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self._position_bias()
        if mask is not None:
            shifted = mask.repeat(windows // mask.shape[0], 1, 1).unsqueeze(1)
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
        x = x.transpose(1, 2).reshape(windows, tokens, -1)
        return self.proj_drop(self.proj(x))

    def _position_bias(self) -> Float[Tensor, "1 heads tokens tokens"]:
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(self.window_area, self.window_area, -1)
        return bias.permute(2, 0, 1).contiguous().unsqueeze(0)

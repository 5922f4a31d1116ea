"""torch's `MultiheadAttention` with quantized products and a quantized packed projection.

Its forward pass is one function that no mode can look into, so it is written out here. In phase
FLOAT torch's own is called.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.attention import attend
from qat.layers import QuantMatmul, through
from qat.quantizers import Phase, Quantizer, quantizers


class QuantMultiheadAttention(nn.MultiheadAttention):
    """Twin of `nn.MultiheadAttention`, whose parameters it takes over under their own names.

    Args:
        attention: The float module.
        weight_quantizer: Quantizer of the packed projection (3 * embed_dim, embed_dim).
        input_quantizer: Quantizer of what it projects (..., embed_dim).
        qk: Product of queries and keys.
        av: Product of the attention map and the values.

    Raises:
        ValueError: If queries, keys and values have projections of their own, or keys and values
            are extended.
    """

    def __init__(
        self,
        attention: nn.MultiheadAttention,
        weight_quantizer: Quantizer | None,
        input_quantizer: Quantizer | None,
        qk: QuantMatmul,
        av: QuantMatmul,
    ) -> None:
        nn.Module.__init__(self)
        extended = attention.bias_k is not None or attention.add_zero_attn
        if attention.in_proj_weight is None or extended:
            raise ValueError(
                "a MultiheadAttention with separate projections, bias_k or add_zero_attn cannot be "
                "quantized; keep it in float by an earlier rule without specs"
            )
        self.__dict__.update(attention.__dict__, _modules=dict(attention._modules))
        self.weight_quantizer, self.input_quantizer = weight_quantizer, input_quantizer
        self.qk, self.av = qk, av

    @property
    def weight(self) -> nn.Parameter:
        """The packed projection of queries, keys and values."""
        return self.in_proj_weight

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention, by the arguments of torch.

        Raises:
            ValueError: If attention weights are asked for while the module is quantized.
        """
        if all(q.phase is Phase.FLOAT for _, q in quantizers(self)):
            settings: dict[str, Any] = {"is_causal": is_causal}
            settings["average_attn_weights"] = average_attn_weights
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, **settings
            )
        if need_weights:
            raise ValueError(
                "a quantized MultiheadAttention does not return its attention weights; call it "
                "with need_weights=False"
            )
        batched, first = query.dim() == 3, self.batch_first
        q, k, v = (x if batched else x.unsqueeze(int(not first)) for x in (query, key, value))
        q, k, v = (x if first else x.transpose(0, 1) for x in (q, k, v))
        mask = _mask(attn_mask, key_padding_mask, q.dtype, self.num_heads)
        heads = [
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in self._projected(q, k, v)
        ]
        dropout = self.dropout if self.training else 0.0
        x = attend(self.qk, self.av, None, *heads, attn_mask=mask, dropout_p=dropout)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        x = x if first else x.transpose(0, 1)
        return x if batched else x.squeeze(int(not first)), None

    def _projected(self, *operands: Tensor) -> list[Tensor]:
        """Queries, keys and values; each distinct input is quantized once."""
        weights = through(self.weight_quantizer, self.in_proj_weight).chunk(3)
        bias = self.in_proj_bias
        biases = [None] * 3 if bias is None else bias.chunk(3)
        seen = {id(x): through(self.input_quantizer, x) for x in operands}
        inputs = [seen[id(x)] for x in operands]
        return [F.linear(*each) for each in zip(inputs, weights, biases, strict=True)]


def _mask(
    attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype, num_heads: int
) -> Tensor | None:
    """What is added to the logits (batch, heads, queries, keys) for masks in torch's forms."""
    masks = []
    for mask in (attn_mask, padding):
        if mask is not None and mask.dtype is torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
        masks.append(mask)
    attention, padding = masks
    if attention is not None and attention.dim() == 3:
        attention = attention.unflatten(0, (-1, num_heads))
    if padding is None:
        return attention
    padding = padding.view(-1, 1, 1, padding.shape[-1])
    return padding if attention is None else attention + padding

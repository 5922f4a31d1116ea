"""`scaled_dot_product_attention` with its two products in the open, where quantizers can be."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from qat.layers import QuantMatmul
from qat.quantizers import Phase


def attend(
    qk: QuantMatmul,
    av: QuantMatmul,
    context: nn.Module | None,
    query: Float[Tensor, "*batch tokens dim"],
    key: Float[Tensor, "... keys dim"],
    value: Float[Tensor, "... keys dim_v"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "*batch tokens dim_v"]:
    """The output of attention, by the arguments of torch.

    Args:
        qk: Product of queries and keys.
        av: Product of the attention map and the values.
        context: Optional module that is given the result and the three operands.
        query: Queries.
        key: Keys.
        value: Values.
        attn_mask: Added to the logits, or true where they count.
        dropout_p: Probability that a value of the attention map is dropped.
        is_causal: Attend to earlier tokens only.
        scale: Multiplies the logits; None is one over the square root of `dim`.
        enable_gqa: Repeat keys and values, so that they have as many heads as queries.
    """
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(repeats, -3) for x in (key, value))
    logits = qk(query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        ones = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(~ones.tril(), -torch.inf)
    if attn_mask is not None:
        boolean = attn_mask.dtype is torch.bool
        logits = logits.masked_fill(~attn_mask, -torch.inf) if boolean else logits + attn_mask
    weights = logits.softmax(-1)
    weights = F.dropout(weights, dropout_p) if dropout_p else weights
    result = av(weights, value)
    if context is not None and av.phase is Phase.QUANTIZE:
        result = context(result, query, key, value)
    return result

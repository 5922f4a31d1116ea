"""Dynamic per-token quantization."""

import pytest
import torch
from torch.testing import assert_close

from qat import Granularity, Phase, QuantSpec
from qat.quantizers import DynamicToken


def _quantizer(bits: int = 4) -> DynamicToken:
    quantizer = DynamicToken(QuantSpec(bits), (3,))
    quantizer.phase = Phase.QUANTIZE
    return quantizer


def test_each_token_is_scaled_by_its_own_largest_value() -> None:
    """Scales 7 / 7 and 0.07 / 7; -3.4 and 0.034 fall on codes -3 and 3."""
    x = torch.tensor([[7.0, -3.4, 0.4], [-0.07, 0.034, 0.004], [0.0, 0.0, 0.0]])
    quantizer = _quantizer()
    codes = quantizer.codes(x)
    assert codes.values.tolist() == [[7, -3, 0], [-7, 3, 0], [0, 0, 0]]
    expected = torch.tensor([[7.0, -3.0, 0.0], [-0.07, 0.03, 0.0], [0.0, 0.0, 0.0]])
    assert_close(quantizer(x), expected)


def test_a_token_does_not_depend_on_its_batch() -> None:
    x = torch.randn(2, 5, 3)
    quantizer = _quantizer()
    assert torch.equal(quantizer(x)[0, 2], quantizer(x[0, 2]))


def test_gradient_passes_straight_through() -> None:
    x = torch.tensor([[1.0, -0.3, 0.2]], requires_grad=True)
    _quantizer()(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(1, 3))


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (QuantSpec(4, False), (3,), r"give the input the spec \{bits: 4\}"),
        (QuantSpec(4, granularity=Granularity.PER_CHANNEL), (3,), "one scale a token"),
        (QuantSpec(4), (4, 1, 1), "needs features on the last axis"),
    ],
)
def test_what_has_no_tokens_is_refused(
    spec: QuantSpec, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicToken(spec, shape)

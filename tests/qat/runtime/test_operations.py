"""The reference of each operation, against its definition in double precision."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from binaryvit.blocks import RPReLU, shortcut
from qat.runtime import REFERENCE
from qat.runtime import operations as ops

RANDOM = np.random.default_rng(0)


def _floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("k", [1, 63, 64, 65, 192, 300])
def test_a_binary_product_is_that_of_the_signs(k: int) -> None:
    x, w = _floats(2, 300, k), _floats(17, k)
    threshold = _floats(2, k)
    signs = ops.sign_pack(x, threshold)
    weight = ops.prepare_binary(ops.pack_signs(w >= 0), k)
    a = np.where(x - threshold[:, None] >= 0, 1, -1).reshape(-1, k)
    expected = a @ np.where(w >= 0, 1, -1).T
    found = ops.binary_gemm(signs.reshape(600, -1), weight, k)
    assert found.dtype == np.int32 and (found == expected).all()
    scale, bias = _floats(17), _floats(17)
    layer = ops.binary_linear(signs.reshape(600, -1), weight, k, scale, bias)
    np.testing.assert_allclose(layer, expected * scale + bias, rtol=1e-5, atol=1e-5)


def test_the_sign_of_zero_is_positive_and_groups_share_thresholds() -> None:
    x = np.zeros((4, 1, 2), np.float32)
    threshold = np.array([[0, 1], [1, 0]], np.float32)
    assert ops.sign_pack(x, threshold).ravel().tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize(("largest", "dtype"), [(1, np.float32), (255, np.float64)])
def test_products_of_integers_are_exact(largest: int, dtype: type) -> None:
    """Float32 where 2^24 bounds every sum, else float64."""
    weight = RANDOM.integers(-255, 256, (9, 3072))
    steps = RANDOM.integers(-largest, largest + 1, (5, 3072)).astype(np.float32)
    ready = ops.prepare_integer(weight.astype(np.int32), largest)
    assert ready.dtype == dtype
    found = ops.integer_linear(steps, ready, np.ones(9, np.float32), None)
    exact = steps.astype(np.int64) @ weight.T
    assert (found == exact.astype(np.float32)).all()


def test_gelu_is_nearer_to_the_exact_one_than_torch_promises() -> None:
    x = np.concatenate([_floats(100_000) * 3, np.array([0, -0.0, 50, -50, 1e30, -1e30], "f4")])
    exact = F.gelu(torch.from_numpy(x.astype(np.float64))).numpy()
    np.testing.assert_allclose(ops.gelu(x), exact, atol=5e-7, rtol=1e-6)


def test_layer_norm_softmax_and_what_follows_a_react_layer() -> None:
    x, y, weight, bias = _floats(50, 64), _floats(50, 16), _floats(16), _floats(16)
    bend = RPReLU(16)
    vectors = [getattr(bend, name) for name in ("before", "slope", "after")]
    for vector in vectors:
        vector.data = torch.from_numpy(_floats(16))
    t = torch.from_numpy
    normed = F.layer_norm(t(y).double(), (16,), t(weight).double(), t(bias).double(), 1e-5)
    found = ops.layer_norm(y, weight, bias, 1e-5)
    np.testing.assert_allclose(found, normed.numpy(), atol=1e-5)
    expected = bend((normed + shortcut(t(x), 16)).float()).detach().numpy()
    arrays = [vector.detach().numpy() for vector in vectors]
    found = ops.react(y, x, weight, bias, 1e-5, *arrays)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (ops.shortcut(y, 64) == shortcut(t(y), 64).numpy()).all()
    np.testing.assert_allclose(ops.softmax(x), t(x).softmax(-1).numpy(), atol=1e-6)


def test_binary_attention_is_its_definition() -> None:
    qkv, threshold = _floats(2, 9, 3, 4, 16), _floats(3, 2, 4, 16) * 0.3
    found = ops.binary_attention(qkv, threshold, 0.25, 0.2)
    signs = np.where(qkv - threshold.transpose(1, 0, 2, 3)[:, None] >= 0, 1.0, -1.0)
    q, k, v = (torch.from_numpy(signs[:, :, i]).transpose(1, 2) for i in range(3))
    marks = ((q @ k.mT * 0.25).softmax(-1) / 0.2).round().clamp(0, 1)
    expected = (marks @ v * 0.2).transpose(1, 2).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_table_holds_every_operation_by_its_name() -> None:
    assert all(REFERENCE[name].__name__ == name for name in REFERENCE)
    assert set(REFERENCE) == {
        "sign_pack", "prepare_binary", "binary_gemm", "binary_linear", "prepare_integer",
        "integer_linear", "prepare_linear", "linear", "layer_norm", "gelu", "softmax", "rprelu",
        "shortcut", "react", "binary_attention",
    }  # fmt: skip

"""Native kernels against NumPy: integers bit for bit on every instruction set, floats closely."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qat.kernels import bounds, instruction_sets, loader, operations, set_threads
from qat.runtime import REFERENCE

SHAPES = [(1, 1, 1), (5, 33, 65), (13, 31, 2000), (40, 17, 63), (33, 64, 128), (50, 100, 384)]
HEADS = [
    (1, 197, 1, 64),
    (2, 7, 2, 32),
    (1, 65, 3, 48),
    (1, 5, 2, 128),
    (3, 1, 1, 7),
    (1, 33, 1, 300),
]

needs_kernels = pytest.mark.skipif(not instruction_sets(), reason="built without a C++ compiler")


@pytest.fixture(params=instruction_sets())
def kernels(request: pytest.FixtureRequest) -> SimpleNamespace:
    return SimpleNamespace(**loader.operations_of(request.param))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    set_threads(request.param)
    yield request.param
    set_threads(1)


def _rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _packed(bits: np.ndarray) -> np.ndarray:
    """Bits as words, by the definition of the layout."""
    k = bits.shape[-1]
    padded = np.zeros((*bits.shape[:-1], -(-k // 64) * 64), np.uint8)
    padded[..., :k] = bits
    return np.packbits(padded, axis=-1, bitorder="little").view("<u8")


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


@needs_kernels
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_binary_products_are_exact(
    kernels: SimpleNamespace, threads: int, rows: int, n: int, k: int
) -> None:
    rng = _rng(rows, n, k)
    a, b = rng.integers(0, 2, (rows, k)), rng.integers(0, 2, (n, k))
    dot = ((2 * a - 1) @ (2 * b - 1).T).astype(np.int32)
    left, weight = _packed(a), kernels.prepare_binary(_packed(b), k)
    np.testing.assert_array_equal(kernels.binary_gemm(left, weight, k), dot)
    scale, bias, residual = _normal(rng, n), _normal(rng, n), _normal(rng, rows, n)
    values = scale * dot.astype(np.float32)
    np.testing.assert_array_equal(kernels.binary_linear(left, weight, k, scale, None), values)
    np.testing.assert_array_equal(
        kernels.binary_linear(left, weight, k, scale, bias, residual), values + bias + residual
    )
    low, high = rng.integers(-k - 2, k + 2, (2, n), dtype=np.int32)
    np.testing.assert_array_equal(
        kernels.binary_linear_bits(left, weight, k, low, high),
        _packed((dot <= low) | (dot >= high)),
    )


@needs_kernels
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_integer_products_are_exact(
    kernels: SimpleNamespace, threads: int, rows: int, n: int, k: int
) -> None:
    rng = _rng(rows, n, k, 1)
    steps, weight = rng.integers(-255, 256, (rows, k)), rng.integers(-255, 256, (n, k))
    scale, bias = _normal(rng, n), _normal(rng, n)
    prepared = kernels.prepare_integer(weight.astype(np.int16), 255)
    result = kernels.integer_linear(steps.astype(np.float32), prepared, scale, bias)
    np.testing.assert_array_equal(result, scale * (steps @ weight.T).astype(np.float32) + bias)


@needs_kernels
@pytest.mark.parametrize(("size", "largest"), [(70_000, 255), (3, 65_535)])
def test_integers_that_do_not_fit_are_multiplied_exactly(
    kernels: SimpleNamespace, size: int, largest: int
) -> None:
    steps, weight = np.full((1, size), largest, np.float32), np.full((1, size), largest, np.int32)
    prepared = kernels.prepare_integer(weight, largest)
    one = np.ones(1, np.float32)
    assert kernels.integer_linear(steps, prepared, one, None) == np.float32(size * largest**2)


@needs_kernels
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_float_products_are_close(
    kernels: SimpleNamespace, threads: int, rows: int, n: int, k: int
) -> None:
    rng = _rng(rows, n, k, 2)
    x, weight, bias = _normal(rng, rows, k), _normal(rng, n, k), _normal(rng, n)
    result = kernels.linear(x, kernels.prepare_linear(weight), bias)
    np.testing.assert_allclose(result, x.astype(float) @ weight.T + bias, atol=3e-5 * math.sqrt(k))


@needs_kernels
@pytest.mark.parametrize("k", [1, 15, 64, 100, 384])
@pytest.mark.parametrize("per_group", [False, True])
def test_signs_are_exact_at_the_threshold_and_for_nan(
    kernels: SimpleNamespace, threads: int, k: int, per_group: bool
) -> None:
    rng = _rng(k)
    x = np.rint(_normal(rng, 3, 5, k)).astype(np.float32)  # many values on their threshold
    x[0, 0, 0] = np.nan
    threshold = np.rint(_normal(rng, 3 if per_group else 1, k)).astype(np.float32)
    np.testing.assert_array_equal(kernels.sign_pack(x, threshold), _packed(x >= threshold[:, None]))


@needs_kernels
@pytest.mark.parametrize("k", [1, 15, 64, 100, 384])
def test_thresholds_follow_the_mean_of_a_group_to_the_last_bit(
    kernels: SimpleNamespace, threads: int, k: int
) -> None:
    """Rows of zeros lie on their threshold, which is the mean minus what NumPy makes of it."""
    x, gain = _normal(_rng(k), 2, 197, k), _normal(_rng(k, 1), k)
    x[:, 7], x[:, 9] = 0, -1e-38
    for group in x:
        mean = group.mean(0, dtype=np.float64).astype(np.float32)
        bits = kernels.sign_pack(group[None], -(gain * mean)[None], gain)[0]
        np.testing.assert_array_equal(bits[[7, 9]], _packed(np.stack([mean == mean, mean != mean])))
    threshold = _normal(_rng(k, 2), 2, k)
    np.testing.assert_array_equal(
        kernels.sign_pack(x, threshold, gain), REFERENCE["sign_pack"](x, threshold, gain)
    )


@needs_kernels
@pytest.mark.parametrize(("batch", "tokens", "heads", "dim"), HEADS)
@pytest.mark.parametrize("share", [0.05, 0.5, 2.0])
def test_binary_attention_is_exact(
    kernels: SimpleNamespace,
    threads: int,
    batch: int,
    tokens: int,
    heads: int,
    dim: int,
    share: float,
) -> None:
    rng = _rng(batch, tokens, heads, dim)
    qkv = _normal(rng, batch, tokens, 3, heads, dim)
    threshold = _normal(rng, 3, batch, heads, dim) * np.float32(0.3)
    scale, map_scale = dim**-0.5, 2 * share / tokens
    bits = qkv >= threshold.transpose(1, 0, 2, 3)[:, None]
    q, k, v = (2.0 * bits - 1).transpose(2, 0, 3, 1, 4)
    powers = np.exp(q @ k.swapaxes(-1, -2) * scale)
    marked = powers / powers.sum(-1, keepdims=True) > map_scale / 2
    count = (marked @ v).swapaxes(1, 2)
    np.testing.assert_array_equal(
        kernels.binary_attention(qkv, threshold, scale, map_scale),
        count.astype(np.float32) * np.float32(map_scale),
    )
    if dim % 64 == 0:
        low, high = rng.integers(-tokens - 1, tokens + 1, (2, heads * dim), dtype=np.int32)
        flat = count.reshape(batch, tokens, -1)
        np.testing.assert_array_equal(
            kernels.binary_attention_bits(_packed(bits), dim, scale, map_scale, low, high),
            _packed((flat <= low) | (flat >= high)),
        )


@needs_kernels
@pytest.mark.parametrize("k", [1, 17, 64, 200])
def test_row_operations_are_close(kernels: SimpleNamespace, threads: int, k: int) -> None:
    rng = _rng(k)
    x, y = 3 * _normal(rng, 6, k), _normal(rng, 6, 2 * k)
    weight, bias, slope = (_normal(rng, k) for _ in range(3))
    wide = x.astype(float)
    normed = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    normed = normed * weight + bias
    erf = np.vectorize(math.erf)(wide / math.sqrt(2))
    powers = np.exp(wide - wide.max(-1, keepdims=True))

    def bent(z: np.ndarray) -> np.ndarray:
        return np.where(z >= weight, z - weight, slope * (z - weight)) + bias

    carried = normed + y.reshape(6, k, 2).mean(-1)
    for result, expected in (
        (kernels.layer_norm(x, weight, bias, 1e-5), normed),
        (kernels.gelu(x), wide * (1 + erf) / 2),
        (kernels.softmax(x), powers / powers.sum(-1, keepdims=True)),
        (kernels.rprelu(x, weight, slope, bias), bent(wide)),
        (kernels.shortcut(y, k), y.reshape(6, k, 2).mean(-1)),
        (kernels.shortcut(x, 2 * k), np.tile(x, (1, 2))),
        (kernels.react(x, y, weight, bias, 1e-5, weight, slope, bias), bent(carried)),
    ):
        np.testing.assert_allclose(result, expected, atol=2e-6 * math.sqrt(k), rtol=1e-5)


@needs_kernels
def test_nothing_gives_nothing(kernels: SimpleNamespace) -> None:
    bits = kernels.sign_pack(np.ones((0, 5, 70), np.float32), np.ones((0, 70), np.float32))
    assert bits.shape == (0, 5, 2)
    weight = kernels.prepare_binary(np.zeros((3, 2), np.uint64), 70)
    assert kernels.binary_gemm(bits.reshape(0, 2), weight, 70).shape == (0, 3)
    qkv, threshold = np.ones((0, 4, 3, 2, 8), np.float32), np.ones((3, 0, 2, 8), np.float32)
    assert kernels.binary_attention(qkv, threshold, 1.0, 1.0).shape == (0, 4, 2, 8)
    assert kernels.softmax(np.ones((0, 4), np.float32)).shape == (0, 4)


@needs_kernels
def test_sign_of_a_norm_is_that_of_its_parts(kernels: SimpleNamespace, threads: int) -> None:
    rng = _rng(0)
    x, weight, bias, threshold = (
        _normal(rng, *shape) for shape in ((2, 9, 70), (70,), (70,), (1, 70))
    )
    parts = kernels.layer_norm(x.reshape(18, 70), weight, bias, 1e-6).reshape(x.shape)
    np.testing.assert_array_equal(
        kernels.norm_sign_pack(x, weight, bias, 1e-6, threshold),
        kernels.sign_pack(parts, threshold),
    )


@needs_kernels
def test_floats_do_not_depend_on_the_instruction_set() -> None:
    x = 3 * _normal(_rng(3), 7, 333)
    ones = np.ones(333, np.float32)
    for run in (
        lambda run: run["gelu"](x),
        lambda run: run["softmax"](x),
        lambda run: run["layer_norm"](x, ones, ones, 1e-6),
    ):
        results = {run(loader.operations_of(name)).tobytes() for name in instruction_sets()}
        assert len(results) == 1


@needs_kernels
def test_what_does_not_fit_is_refused(kernels: SimpleNamespace) -> None:
    bits, ones = np.zeros((2, 2), np.uint64), np.ones(4, np.float32)
    weight = kernels.prepare_binary(np.zeros((4, 2), np.uint64), 100)
    with pytest.raises(ValueError, match=r"bits must be uint64 \(2, 1\), got uint64 \(2, 2\)"):
        kernels.binary_gemm(bits, kernels.prepare_binary(np.zeros((4, 1), np.uint64), 60), 60)
    with pytest.raises(ValueError, match="with 100 inputs, this operation needs binary"):
        kernels.binary_gemm(bits, weight, 101)
    with pytest.raises(ValueError, match="scale must be float32"):
        kernels.binary_linear(bits, weight, 100, ones[:3], None)
    with pytest.raises(ValueError, match="neither is a multiple"):
        kernels.shortcut(np.ones((1, 4), np.float32), 6)
    with pytest.raises(ValueError, match="at least 1 thread"):
        set_threads(0)


@pytest.mark.parametrize("activation", ["identity", "gelu", "falling"])
def test_bounds_give_the_sign_of_any_activation_of_an_integer(activation: str) -> None:
    """GELU falls and rises: its sign against a threshold below zero is set on both sides."""
    grid = np.arange(-64, 65, 2, dtype=np.int32)
    scale = np.float32(0.07) * (-1 if activation == "falling" else 1)
    x = scale * grid.astype(np.float32) + np.linspace(-1, 1, 9, dtype=np.float32)[:, None]
    erf = np.vectorize(math.erf)(x / math.sqrt(2))
    signs = (x if activation == "identity" else x * (1 + erf) / 2) >= np.float32(-0.1)
    low, high = bounds(signs, grid)
    np.testing.assert_array_equal((grid <= low[:, None]) | (grid >= high[:, None]), signs)


def test_bounds_refuse_a_sign_that_is_set_in_the_middle() -> None:
    with pytest.raises(ValueError, match="more than twice"):
        bounds(np.array([[False, True, False]]), np.array([-1, 0, 1], np.int32))


@needs_kernels
@pytest.mark.parametrize("name", [*instruction_sets(), "numpy"])
def test_environment_forces_an_instruction_set(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("LOWBIT_KERNELS", name)
    assert loader.instruction_set() == name
    assert bool(operations()) == (name != "numpy")


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_KERNELS", "avx1024")
    with pytest.raises(ValueError, match=r"LOWBIT_KERNELS is 'avx1024', this machine has .*numpy"):
        operations()


def test_without_a_compiler_numpy_does_the_work_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.delenv("LOWBIT_KERNELS", raising=False)
    monkeypatch.setattr(loader, "_HERE", tmp_path)
    caches = (loader._library, loader.instruction_sets)
    for cached in caches:
        cached.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert operations() == operations() == {}
            assert loader.instruction_set() == "numpy"
            set_threads(2)
        assert [record.name for record in caplog.records] == ["qat.kernels.loader"]
    finally:
        for cached in caches:
            cached.cache_clear()

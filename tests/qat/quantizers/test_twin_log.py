"""Twin-log weights: levels by hand, number of codes, search by brute force, integer form, SQNR."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from qat import Granularity, Operand, Phase, QuantSpec
from qat.quantizers import MSE, Affine, Quantizer, QuantizerFactory, TwinLog
from qat.quantizers.twin_log_grid import (
    MODES,
    OFFSETS,
    QUANTILES,
    Mode,
    search,
    shift_and_multiply,
)
from qat.quantizers.twin_log_grid import range_of_code as code_ranges

ROWS, SIZE = 6, 64
PER_CHANNEL = Granularity.PER_CHANNEL


def _weights(std: float = 0.3, rows: int = ROWS, size: int = SIZE) -> Tensor:
    return std * torch.randn(rows, size, generator=torch.Generator().manual_seed(3))


def _frozen(w: Tensor, bits: int, factory: QuantizerFactory) -> Quantizer:
    quantizer = factory(QuantSpec(bits, False, PER_CHANNEL), tuple(w.shape), Operand.WEIGHT)
    quantizer.observe(w)
    quantizer.freeze()
    quantizer.forget()
    quantizer.phase = Phase.QUANTIZE
    return quantizer


def _sqnr(w: Tensor, quantized: Tensor) -> float:
    return float(10 * torch.log10(w.square().sum() / (quantized - w).square().sum()))


def test_clean_levels_and_codes_by_hand() -> None:
    """m = 2, eta = 1/4, from log2(1/4) to log2(5/4): u = 0, 0.1775, 0.4811 and 1 times m."""
    quantizer = TwinLog(QuantSpec(3, False), (1, 4), mode="clean")
    low, step = math.log2(0.25), (math.log2(1.25) - math.log2(0.25)) / 3
    quantizer.gain.fill_(2.0)
    quantizer.lowest.fill_(low)
    quantizer.step.fill_(step)
    quantizer.offset.fill_(0.25)
    magnitudes = [2 * (0.25 * 5 ** (k / 3) - 0.25) for k in range(4)]
    expected = torch.tensor([[*magnitudes, *(-m for m in magnitudes)]])
    assert_close(quantizer.table(), expected)
    w = torch.tensor([[1.9, -0.4, -2.5, 0.01]])
    assert quantizer.codes(w).values.tolist() == [[3, 5, 7, 0]]
    picked = [magnitudes[3], -magnitudes[1], -magnitudes[3], 0.0]
    assert_close(quantizer.fake_quantize(w), torch.tensor([picked]))


def test_paper_levels_are_powers_at_whole_steps_with_a_grid_for_each_sign() -> None:
    """Positive 1/8 .. 1 in four codes: d = 1, lo = -3; negative 1/4 .. 1/2: d = 1/3, lo = -6 d."""
    w = torch.tensor([[0.125, 0.25, 0.5, 1.0, -0.25, -0.5, 0.0]])
    quantizer = _frozen(w, 3, partial(TwinLog, mode="paper"))
    positive = [0.125, 0.25, 0.5, 1.0]
    negative = [-(2 ** (-2 + k / 3)) for k in range(4)]
    assert_close(quantizer.table(), torch.tensor([[*positive, *negative, 0.0]]))
    assert_close(quantizer(w), w)


@pytest.mark.parametrize(("mode", "more"), [("clean", 0), ("paper", 0), ("code", 1)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_that_are_not_zero_in_a_row_number_2_to_the_bits(
    mode: str, more: int, bits: int
) -> None:
    w = _weights(size=4096)
    quantized = _frozen(w, bits, partial(TwinLog, mode=mode))(w)
    most = max(len(row[row != 0].unique()) for row in quantized)
    assert 2**bits - 1 <= most <= 2**bits + more


def test_authors_code_has_one_more_level_for_negative_weights() -> None:
    quantizer = _frozen(_weights(), 3, partial(TwinLog, mode="code"))
    assert quantizer.table().shape == (ROWS, 4 + 5 + 1)


def _literal_code(w: Tensor, bits: int) -> Tensor:
    """The authors' search, restated: 13 offsets x 5 x 5 clips, one row at a time."""
    best, least = w, math.inf
    size = 2 ** (bits - 1)
    for eta, p_plus, p_minus in itertools.product(OFFSETS, QUANTILES, QUANTILES):
        rows = []
        for row in w:
            out = torch.zeros_like(row)
            for sign, p, top in ((1, p_plus, size - 1), (-1, p_minus, size)):
                mask = row * sign > 0
                t = torch.where(mask, (row.abs() + eta).log2(), 0.0)
                high = torch.quantile(t, p, interpolation="nearest")
                s = (high - t.min()) / size
                z = (t.min() / s).round()
                q = ((t / s).round() - z).clamp(0, top)
                out = torch.where(mask, sign * (2 ** ((q + z) * s) - eta), out)
            rows.append(out)
        error = float((torch.stack(rows) - w).square().sum())
        if error < least:
            best, least = torch.stack(rows), error
    return best


def test_range_of_both_signs_in_the_authors_code_is_cut_into_l_steps() -> None:
    """s = (max - min) / L on both sides although the negative one has L + 1 codes."""
    logs = torch.tensor([[-4.0, -2.0, -1.0, -3.0]])
    mask = torch.ones_like(logs, dtype=torch.bool)
    _, step = code_ranges(logs, mask, 0.0, 4)
    assert step[-1].item() == pytest.approx(3 / 4)


def test_search_by_sign_finds_what_the_exhaustive_search_finds() -> None:
    w = _weights(rows=3, size=40)
    found = _frozen(w, 3, partial(TwinLog, mode="code"))(w)
    assert_close(found, _literal_code(w, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_clean_mode_does_not_depend_on_the_scale_of_weights(scale: float) -> None:
    w = _weights()
    once = _frozen(w, 4, TwinLog)(w)
    assert_close(_frozen(w * scale, 4, TwinLog)(w * scale), once * scale, rtol=1e-4, atol=1e-6)


def test_search_is_no_worse_than_any_offset_alone() -> None:
    w = _weights()
    whole = _sqnr(w, _frozen(w, 3, TwinLog)(w))
    for offset in MODES["clean"].offsets:
        grid = search(w, 3, Mode(MODES["clean"].find_range, (offset,), shared=True))
        quantizer = _frozen(w, 3, TwinLog)
        for name in ("gain", "lowest", "step", "offset"):
            getattr(quantizer, name).copy_(getattr(grid, name))
        assert whole >= _sqnr(w, quantizer(w)) - 1e-4


@pytest.mark.parametrize("mode", list(MODES))
def test_rows_of_zeros_and_of_one_sign_are_quantized_to_finite_values(mode: str) -> None:
    w = torch.stack([torch.zeros(8), torch.ones(8), -torch.linspace(1, 2, 8)])
    quantized = _frozen(w, 4, partial(TwinLog, mode=mode))(w)
    assert quantized.isfinite().all()
    assert (quantized[0] == 0).all()
    assert (quantized[2] <= 0).all()


def test_gradient_passes_within_the_largest_level_only() -> None:
    w = _weights()
    quantizer = _frozen(w, 4, TwinLog)
    top = quantizer.table().abs().amax(1, keepdim=True).detach()
    x = torch.cat([w, 3 * w.abs().amax(1, keepdim=True)], 1).requires_grad_()
    quantizer.fake_quantize(x).sum().backward()
    assert torch.equal(x.grad, (x.abs() <= top).float())


@pytest.mark.parametrize("fraction_bits", [1, 4, 8, 15])
def test_shift_and_multiply_is_exact_to_half_a_unit_of_the_multiplier(fraction_bits: int) -> None:
    exponent = torch.linspace(-20, 6, 4001, dtype=torch.float64)
    multiplier, shift = shift_and_multiply(exponent, fraction_bits)
    assert multiplier.dtype is shift.dtype is torch.int64
    assert (multiplier >= 2**fraction_bits).all() and (multiplier <= 2 ** (fraction_bits + 1)).all()
    error = (multiplier.double() * shift.double().exp2() / exponent.exp2() - 1).abs().max()
    assert 2 ** -(fraction_bits + 4) < error <= 2 ** -(fraction_bits + 1)


def test_integer_form_of_a_grid_multiplies_and_shifts_to_its_levels() -> None:
    quantizer = _frozen(_weights(), 4, partial(TwinLog, mode="code"))
    exponent = quantizer.lowest[0][:, None] + torch.arange(8) * quantizer.step[0][:, None]
    multiplier, shift = shift_and_multiply(exponent, 8)
    levels = multiplier.float() * shift.float().exp2() - quantizer.offset
    assert_close(levels, quantizer.table()[:, :8], rtol=0, atol=0.004)


@pytest.mark.parametrize(
    ("operand", "signed", "mode", "message"),
    [
        (Operand.WEIGHT, False, "twin", "mode must be one of paper, code, clean"),
        (Operand.WEIGHT, True, "clean", r"write weight: \{bits: 4, signed: false\}"),
        (Operand.INPUT, False, "clean", "DynamicToken for inputs"),
    ],
)
def test_what_it_cannot_quantize_is_refused(
    operand: Operand, signed: bool, mode: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TwinLog(QuantSpec(4, signed), (4, 4), operand, mode=mode)


TABLE = [
    # weights, std, bits, then dB: uniform, uniform clipped, code, clean (notes 4.2)
    ("gauss", 0.02, 3, 11.96, 14.01, 6.85, 13.34),
    ("gauss", 0.3, 3, 11.98, 14.00, 14.24, 13.35),
    ("gauss", 0.3, 4, 18.61, 19.50, 20.07, 19.61),
    ("student", 0.03, 3, 7.50, 10.21, 7.03, 10.0),
    ("student", 0.3, 3, 7.28, 10.03, 11.16, 10.13),
    ("student", 0.05, 4, 13.56, 14.64, 14.57, 16.73),
    ("student", 0.3, 4, 13.53, 14.67, 17.19, 16.75),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "std", "bits", "uniform", "clipped", "code", "clean"), TABLE)
def test_signal_to_noise_is_that_of_an_independent_simulation(
    kind: str,
    std: float,
    bits: int,
    uniform: float,
    clipped: float,
    code: float,
    clean: float,
) -> None:
    """Student tails vary from sample to sample, and with them the absolute form of the code."""
    torch.manual_seed(0)
    draw = torch.distributions.StudentT(4.0).sample if kind == "student" else torch.randn
    w = std * draw((256, 512))
    tolerance = 0.25 if kind == "gauss" else 0.7
    factories: dict[QuantizerFactory, float] = {
        Affine: uniform,
        partial(Affine, observer=MSE): clipped,
        partial(TwinLog, mode="clean"): clean,
    }
    for factory, expected in factories.items():
        assert _sqnr(w, _frozen(w, bits, factory)(w)) == pytest.approx(expected, abs=tolerance)
    found = _sqnr(w, _frozen(w, bits, partial(TwinLog, mode="code"))(w))
    assert found == pytest.approx(code, abs=0.25 if kind == "gauss" else 2.0)

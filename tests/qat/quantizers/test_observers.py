"""Observers: the range each chooses, worked by hand."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from qat import Granularity, QuantSpec
from qat.quantizers import MSE, MinMax, Observer, ObserverFactory, Percentile
from qat.quantizers.lsq import MeanMagnitude
from qat.quantizers.observers import scale_of_range
from qat.quantizers.percentile_mse import OFFICIAL, PercentileMSE, upper_quantiles

PER_CHANNEL = Granularity.PER_CHANNEL
EVERY = pytest.mark.parametrize("make", [MinMax, Percentile, MSE, MeanMagnitude])


def _range(observer: Observer, *batches: Tensor) -> tuple[Tensor, Tensor]:
    for batch in batches:
        observer.observe(batch)
    return observer.range()


def _squared_error(x: Tensor, bounds: tuple[Tensor, Tensor], spec: QuantSpec) -> float:
    scale, zero_point = scale_of_range(*bounds, spec)
    zero_point = 0 if zero_point is None else zero_point
    codes = (x / scale + zero_point).clamp(spec.qmin, spec.qmax).round()
    return float(((codes - zero_point) * scale - x).square().sum())


def test_min_max_is_the_widest_range_over_batches() -> None:
    lower, upper = _range(
        MinMax(QuantSpec(4), ()), torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0])
    )
    assert (lower, upper) == (-3, 2)


def test_percentile_is_the_mean_order_statistic_over_batches() -> None:
    # Of ten values, 80 % below the upper bound leave a tail of two: its inner member counts.
    observer = Percentile(QuantSpec(4), (), fraction=0.8)
    lower, upper = _range(observer, torch.arange(10.0), 100 * torch.arange(10.0))
    assert (lower, upper) == ((1 + 100) / 2, (8 + 800) / 2)


def test_percentile_of_everything_is_min_max_of_one_batch() -> None:
    x = torch.randn(50)
    found = _range(Percentile(QuantSpec(4), (), fraction=1.0), x)
    assert found == (x.min(), x.max())


@pytest.mark.parametrize("fraction", [0.5, 0.0, 1.01])
def test_percentile_fraction_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"fraction must be in \(0\.5, 1\], got {fraction}"):
        Percentile(QuantSpec(4), (), fraction=fraction)


def test_mse_chooses_the_candidate_of_least_error_over_all_batches() -> None:
    # Codes -2 .. 1. First batch: scale 1 (whole range) rounds eight 0.5 to 0, error 8 / 4 = 2;
    # scale 0.5 (half of it) clips the 1 to 0.5, error 1 / 4. The half wins.
    def make() -> MSE:
        return MSE(QuantSpec(2), (), num_candidates=2, smallest=0.5)

    first = torch.tensor([0.5] * 8 + [1.0])
    assert _range(make(), first) == (0.25, 0.5)
    # Four more 1: no error at scale 1, 4 / 4 at scale 0.5; 2 against 1.25. The half still wins,
    # though the whole is better on this batch alone.
    assert _range(make(), first, torch.ones(4)) == (0.25, 0.5)
    # Twenty more 1: 2 against 5.25. The whole wins.
    assert _range(make(), first, torch.ones(20)) == (0.5, 1)


@pytest.mark.parametrize("spec", [QuantSpec(3), QuantSpec(3, signed=False)], ids=str)
def test_mse_error_is_at_most_that_of_min_max(spec: QuantSpec) -> None:
    x = torch.randn(400) ** 3
    mse, min_max = _range(MSE(spec, ()), x), _range(MinMax(spec, ()), x)
    assert _squared_error(x, mse, spec) < 0.9 * _squared_error(x, min_max, spec)


@pytest.mark.parametrize("arguments", [{"num_candidates": 0}, {"smallest": 0.0}, {"smallest": 2.0}])
def test_mse_candidates_that_are_none_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"num_candidates of at least 1 and smallest in \(0, 1\]"):
        MSE(QuantSpec(4), (), **arguments)


@EVERY
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 1, 5)])
def test_range_of_a_channel_is_that_of_the_channel_alone(
    make: ObserverFactory, signed: bool, shape: tuple[int, ...]
) -> None:
    batches = torch.randn(2, 7, *shape) * torch.arange(1.0, 4).reshape(3, *[1] * (len(shape) - 1))
    found = _range(make(QuantSpec(4, signed, PER_CHANNEL), shape), *batches)
    assert found[0].shape == (3, *[1] * (len(shape) - 1))
    for channel in range(3):
        alone = make(QuantSpec(4, signed), ())
        expected = _range(alone, *(batch[:, channel] for batch in batches))
        assert_close([bound[channel].squeeze() for bound in found], list(expected))


@EVERY
def test_range_without_data_is_an_error_that_says_what_to_run(make: ObserverFactory) -> None:
    with pytest.raises(RuntimeError, match=r"no batch was observed; run `qat\.calibrate"):
        make(QuantSpec(4), ()).range()


@EVERY
def test_reset_forgets_every_batch(make: ObserverFactory) -> None:
    spec, x = QuantSpec(4, granularity=PER_CHANNEL), torch.randn(7, 3)
    used = make(spec, (3,))
    used.observe(100 * torch.randn(7, 3))
    used.reset()
    with pytest.raises(RuntimeError, match="no batch was observed"):
        used.range()
    for found, expected in zip(_range(used, x), _range(make(spec, (3,)), x), strict=True):
        assert torch.equal(found, expected)


@EVERY
def test_statistics_stay_out_of_checkpoints(make: ObserverFactory) -> None:
    assert not make(QuantSpec(4), ()).state_dict()


@pytest.mark.parametrize(
    ("lower", "upper", "scale"),
    [
        (-8.0, 3.5, 1.0),  # 8 / 8 covers the lower end, 3.5 / 7 the upper one
        (-1.0, 14.0, 2.0),
        (2.0, 7.0, 1.0),
        (-4.0, -2.0, 0.5),
        (0.0, 0.0, 1.0),
    ],
)
def test_signed_scale_is_the_smallest_that_covers_both_ends(
    lower: float, upper: float, scale: float
) -> None:
    found = scale_of_range(torch.tensor(lower), torch.tensor(upper), QuantSpec(4))
    assert found == (scale, None)


@pytest.mark.parametrize(
    ("lower", "upper", "scale", "zero_point"),
    [
        (0.0, 3.0, 1.0, 0.0),
        (-1.0, 2.0, 1.0, 1.0),
        (1.0, 3.0, 1.0, 0.0),  # widened to contain zero
        (-3.0, -1.0, 1.0, 3.0),
        (-0.75, 2.25, 1.0, 1.0),
        (-0.5, 2.5, 1.0, 0.0),  # half to even
        (-1.5, 1.5, 1.0, 2.0),
        (0.0, 0.0, 1.0, 0.0),
    ],
)
def test_unsigned_scale_spans_the_range_and_zero_has_a_code(
    lower: float, upper: float, scale: float, zero_point: float
) -> None:
    spec = QuantSpec(2, signed=False)
    assert scale_of_range(torch.tensor(lower), torch.tensor(upper), spec) == (scale, zero_point)


@pytest.mark.parametrize("kind", ["spread", "constant", "one outlier", "sorted"])
def test_upper_quantiles_of_a_long_row_are_exact(kind: str) -> None:
    row = torch.randn(1, 300_001, generator=torch.Generator().manual_seed(0))
    if kind == "constant":
        row = torch.ones_like(row)
    elif kind == "one outlier":
        row = torch.zeros_like(row).index_fill(1, torch.tensor([5]), 9.0)
    elif kind == "sorted":
        row = row.sort().values
    fractions = (0.999, 0.9999, 0.99999, 1.0)
    exact = row.double().quantile(torch.tensor(fractions, dtype=torch.float64), dim=1)
    torch.testing.assert_close(upper_quantiles(row, fractions), exact.float())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ranges_of_least_error_cut_off_more_on_three_bits_and_fewer(bits: int) -> None:
    x, spec = torch.randn(4096, generator=torch.Generator().manual_seed(0)), QuantSpec(bits, False)
    ours, official = (
        _range(PercentileMSE(spec, (4096,), fractions), x) for fractions in (None, OFFICIAL)
    )
    if bits < 4:
        assert _squared_error(x, ours, spec) < 0.8 * _squared_error(x, official, spec)
        assert ours[0] > official[0] and ours[1] < official[1]
    else:
        assert ours == official

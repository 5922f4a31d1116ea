"""Invariants, stated once and swept over every quantizer, integer and binary.

Each case sees a matrix: of a weight the rows are channels, of an activation the columns are.
"""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from binaryvit.quantizers import BinaryActivation, BinaryAttentionMap, BinaryWeight
from qat import Granularity, Operand, Phase, Quantizer, QuantSpec
from qat.quantizers import (
    LSQ,
    MSE,
    Affine,
    DynamicToken,
    Log2,
    LogSqrt2,
    MinMax,
    Percentile,
    PercentileMSE,
    QuantizerFactory,
    TanQ,
    TwinLog,
)
from qat.quantizers.log import ZERO_CODES
from tests.qat.common import SHIFTS
from tests.strategies import tensors

SIZE, CHANNELS = 5, 3
PER_CHANNEL = Granularity.PER_CHANNEL


@dataclass(frozen=True)
class Case:
    """A factory, what it is asked for, and the codes it may give."""

    name: str
    factory: QuantizerFactory
    spec: QuantSpec
    operand: Operand = Operand.INPUT
    grid: tuple[int, ...] | None = None

    @property
    def codes(self) -> tuple[int, ...]:
        """Every code of the grid, in order."""
        return self.grid or tuple(range(self.spec.qmin, self.spec.qmax + 1))

    @property
    def channel_axis(self) -> int:
        """The axis of a scale, and of a shift."""
        return 0 if self.operand is Operand.WEIGHT else 1

    @property
    def is_map(self) -> bool:
        """Whether the operand is an attention map: one scale, and never negative."""
        return self.operand is Operand.ATTENTION

    def build(self) -> Quantizer:
        """A quantizer that has seen nothing."""
        shapes = {Operand.WEIGHT: (CHANNELS, SIZE), Operand.ATTENTION: (CHANNELS, 1, 1)}
        shape = shapes.get(self.operand, (CHANNELS,))
        return self.factory(self.spec, shape, self.operand).eval()

    def frozen(self, x: Tensor) -> Quantizer:
        """A quantizer calibrated on `x`, in phase QUANTIZE."""
        quantizer = self.build()
        quantizer.observe(x)
        quantizer.freeze()
        quantizer.forget()
        quantizer.phase = Phase.QUANTIZE
        with torch.no_grad():
            for name, parameter in quantizer.named_parameters():
                if name in ("shift.shift", "shift.gain"):  # as training leaves them
                    parameter.copy_(torch.linspace(-0.5, 1, CHANNELS))
        return quantizer

    def alone(self, quantizer: Quantizer, channel: int) -> Quantizer:
        """A per-tensor quantizer with the state that `quantizer` has for one channel."""
        shape = (1, SIZE) if self.operand is Operand.WEIGHT else (1,)
        spec = QuantSpec(self.spec.bits, self.spec.signed)
        alone = self.factory(spec, shape, self.operand).eval()
        state = quantizer.state_dict()
        for name, own in alone.state_dict().items():
            if isinstance(own, Tensor) and state[name].numel() == CHANNELS:
                state[name] = state[name].flatten()[channel].reshape(own.shape)
        alone.load_state_dict(state)
        return alone

    def tensor(self, x: Tensor) -> Tensor:
        """Arrange a drawn (size, channels) tensor as this operand."""
        if self.is_map:
            return x.abs() + 2**-12  # softmax outputs are positive
        return x.T.contiguous() if self.operand is Operand.WEIGHT else x


def _integer_cases() -> list[Case]:
    factories = {
        "lsq": LSQ,
        "minmax": Affine,
        "percentile": partial(Affine, observer=partial(Percentile, fraction=0.9)),
        "mse": partial(Affine, observer=partial(MSE, num_candidates=5)),
        "percentile-mse": partial(Affine, observer=PercentileMSE),
    }
    cases = [
        Case(f"{name}-{'signed' if signed else 'unsigned'}-{granularity}", factory, spec)
        for name, factory in factories.items()
        for signed in (True, False)
        for granularity in Granularity
        for spec in (QuantSpec(4, signed, granularity),)
    ]
    for name in ("lsq", "minmax"):
        spec = QuantSpec(4, granularity=PER_CHANNEL)
        cases.append(Case(f"{name}-weight", factories[name], spec, Operand.WEIGHT))
    for bits in (2, 8, 16):
        cases.append(Case(f"lsq-{bits}", partial(LSQ, observer=MinMax), QuantSpec(bits)))
        cases.append(Case(f"minmax-unsigned-{bits}", Affine, QuantSpec(bits, signed=False)))
    return cases


ONE = QuantSpec(1)
MAP = Case("map", BinaryAttentionMap, QuantSpec(1, False), Operand.ATTENTION, (0, 1))
SIGNS = [
    Case(f"sign-{shift.__name__}", partial(BinaryActivation, shift=shift), ONE, grid=(-1, 1))
    for shift in SHIFTS
]
WEIGHTS = [
    Case(
        f"weight-centred-{centre}",
        partial(BinaryWeight, centre=centre),
        ONE,
        Operand.WEIGHT,
        (-1, 1),
    )
    for centre in (True, False)
]
FOUR = QuantSpec(4, signed=False)
COMPANDED = [
    *(
        Case(
            f"{kind.__name__}-{zero}",
            partial(kind, zero=zero),
            FOUR,
            Operand.ATTENTION,
            tuple(range(17 if zero == "extra" else 16)),
        )
        for kind in (Log2, LogSqrt2)
        for zero in ZERO_CODES
    ),
    *(
        Case(f"TanQ-{form}", partial(TanQ, form=form), FOUR, Operand.ATTENTION)
        for form in ("t1", "t2")
    ),
]
TWIN_SPEC = QuantSpec(4, False, PER_CHANNEL)
TWIN_LOGS = [
    Case(
        f"twin-log-{mode}",
        partial(TwinLog, mode=mode),
        TWIN_SPEC,
        Operand.WEIGHT,
        tuple(range(num_codes)),
    )
    for mode, num_codes in (("paper", 17), ("code", 18), ("clean", 16))
]
DYNAMIC = Case("dynamic-token", DynamicToken, QuantSpec(4))
INTEGER = [*_integer_cases(), MAP]
ORDERED = [*INTEGER, *COMPANDED, *SIGNS, *WEIGHTS, TWIN_LOGS[0], TWIN_LOGS[2]]
"""All but scales that differ between the rows of a channel, and the authors' code of twin logs,
whose smallest levels can have the wrong sign."""
EVERY = [*INTEGER, *COMPANDED, *SIGNS, *WEIGHTS, *TWIN_LOGS, DYNAMIC]
# Without those that take a mean of `x`: its rounding depends on the layout in memory.
GRANULAR = [
    *(case for case in INTEGER if case.spec.granularity is PER_CHANNEL),
    *(case for case in SIGNS if case.name != "sign-DynamicShift"),
]

matrices = tensors((SIZE, CHANNELS))
few = settings(max_examples=10)
every = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
integer = pytest.mark.parametrize("case", INTEGER, ids=lambda case: case.name)
granular = pytest.mark.parametrize("case", GRANULAR, ids=lambda case: case.name)


@every
@few
@given(seen=matrices, x=matrices)
def test_codes_lie_on_the_grid(case: Case, seen: Tensor, x: Tensor) -> None:
    codes = case.frozen(case.tensor(seen)).codes(case.tensor(x))
    assert not codes.values.is_floating_point()
    assert set(codes.values.flatten().tolist()) <= set(case.codes)


@every
@few
@given(seen=matrices, x=matrices)
def test_dequantized_codes_equal_fake_quantize(case: Case, seen: Tensor, x: Tensor) -> None:
    quantizer, x = case.frozen(case.tensor(seen)), case.tensor(x)
    assert torch.equal(quantizer.dequantize(quantizer.codes(x)), quantizer(x))


@every
@pytest.mark.parametrize("whole", [True, False], ids=["model", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@settings(max_examples=3)
@given(seen=matrices, x=matrices)
def test_codes_and_forward_agree_in_every_dtype(
    case: Case, dtype: torch.dtype, whole: bool, seen: Tensor, x: Tensor
) -> None:
    """Of a model in that dtype as a whole, and of one whose activations alone are in it."""
    quantizer, x = case.frozen(case.tensor(seen)), case.tensor(x).to(dtype)
    quantizer = quantizer.to(dtype) if whole else quantizer
    expected = quantizer(x)
    assume(expected.isfinite().all())  # a scale can be too small for float16
    assert torch.equal(quantizer.dequantize(quantizer.codes(x)), expected)


@pytest.mark.parametrize("case", [*INTEGER, *COMPANDED], ids=lambda case: case.name)
@few
@given(seen=matrices, x=matrices)
def test_quantizing_twice_is_quantizing_once(case: Case, seen: Tensor, x: Tensor) -> None:
    quantizer = case.frozen(case.tensor(seen))
    once = quantizer(case.tensor(x))
    assert torch.equal(quantizer(once), once)


@pytest.mark.parametrize("case", ORDERED, ids=lambda case: case.name)
@few
@given(seen=matrices, x=matrices)
def test_output_is_monotone_in_each_channel(case: Case, seen: Tensor, x: Tensor) -> None:
    quantizer = case.frozen(case.tensor(seen))
    size_axis = 1 - case.channel_axis
    output = quantizer(case.tensor(x).sort(size_axis).values)
    assert (output.diff(dim=size_axis) >= 0).all()


@every
@few
@given(seen=matrices, x=matrices)
def test_float_phase_is_the_identity(case: Case, seen: Tensor, x: Tensor) -> None:
    quantizer, x = case.frozen(case.tensor(seen)), case.tensor(x)
    quantizer.phase = Phase.FLOAT
    assert torch.equal(quantizer(x), x)


@integer
@few
@given(seen=matrices, x=matrices)
def test_error_inside_the_range_is_at_most_half_a_step(case: Case, seen: Tensor, x: Tensor) -> None:
    quantizer, x = case.frozen(case.tensor(seen)), case.tensor(x)
    codes = quantizer.codes(x)
    offset = 0 if codes.zero_point is None else codes.zero_point
    lower, upper = ((bound - offset) * codes.scale for bound in (case.codes[0], case.codes[-1]))
    inside = (x >= lower) & (x <= upper)
    half = 0.5 + 2**-22 * case.codes[-1]  # rounding of x / scale + zero_point in float32
    assert ((quantizer(x) - x).abs() <= half * codes.scale)[inside].all()


@granular
@few
@given(seen=matrices, x=matrices)
def test_per_channel_equals_per_tensor_channel_by_channel(
    case: Case, seen: Tensor, x: Tensor
) -> None:
    quantizer, x = case.frozen(case.tensor(seen)), case.tensor(x)
    output = quantizer(x)
    for channel in range(CHANNELS):
        alone = case.alone(quantizer, channel)
        own = x.narrow(case.channel_axis, channel, 1)
        assert torch.equal(alone(own), output.narrow(case.channel_axis, channel, 1))


@every
@few
@given(seen=matrices, x=matrices)
def test_state_round_trip_is_bit_exact_phase_included(case: Case, seen: Tensor, x: Tensor) -> None:
    source, target, x = case.frozen(case.tensor(seen)), case.build(), case.tensor(x)
    target.load_state_dict(source.state_dict())
    assert target.phase is Phase.QUANTIZE
    assert torch.equal(target(x), source(x))


@every
@few
@given(seen=matrices, x=matrices)
def test_bfloat16_gives_the_float32_output_rounded(case: Case, seen: Tensor, x: Tensor) -> None:
    quantizer, half = case.frozen(case.tensor(seen)), case.tensor(x).bfloat16()
    output, exact = quantizer(half), quantizer(half.float())
    assert output.dtype is torch.bfloat16
    assert ((output.float() - exact).abs() <= exact.abs() * 2**-8).all()

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from binaryvit.grs import (
    GRS,
    BoundaryPull,
    DistancePull,
    GradientDamping,
    KurtosisPull,
    Pull,
    SignPull,
    constant,
    cosine_ramp,
    last_tenth,
)
from binaryvit.ops import sign
from binaryvit.quantizers import BinaryWeight
from qat import Phase, QuantSpec
from qat.layers import QuantLinear
from qat.quantizers import LSQ

PULLS: tuple[Pull, ...] = (DistancePull(), SignPull(), BoundaryPull(), KurtosisPull())
FORMS = (*PULLS, GradientDamping())
SCHEDULES = (constant, cosine_ramp, last_tenth)
every_pull = pytest.mark.parametrize("form", PULLS, ids=lambda form: type(form).__name__)
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)

POINTS = torch.tensor([[-6.0, -2.0, -1.0, -0.0, 0.0, 1.0, 2.0, 6.0]])
K = torch.tensor([[2.0]])


def binary_model(centre: bool = True) -> nn.Sequential:
    """Two binary layers, a 4-bit one and a float one, in float64, with gradients everywhere."""
    one_bit = QuantSpec(1)
    layers = [
        QuantLinear(nn.Linear(6, 5), BinaryWeight(one_bit, (5, 6), centre=centre)),
        QuantLinear(nn.Linear(5, 4), BinaryWeight(one_bit, (4, 5), centre=centre)),
        QuantLinear(nn.Linear(4, 3), LSQ(QuantSpec(4), (3, 4))),
        nn.Linear(3, 2),
    ]
    model = nn.Sequential(*layers).double()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def binary_layers(model: nn.Module) -> list[QuantLinear]:
    """The layers of `binary_model` that GRS acts on."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    return [layer for layer in layers if isinstance(layer.weight_quantizer, BinaryWeight)]


def latent_and_scale(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The centred latent, and the row mean of |weight|."""
    weight = weight.detach()
    return weight - weight.mean(1, keepdim=True), weight.abs().mean(1, keepdim=True)


def random_latents() -> tuple[Tensor, Tensor]:
    """Latents without zeros, in float64, and their row means of |w|."""
    w = torch.randn(6, 40, dtype=torch.float64) * torch.arange(1, 7).unsqueeze(1)
    return w, w.abs().mean(1, keepdim=True)


# The directions.


def test_distance_pull_equals_g1_at_hand_picked_points() -> None:
    # -sgn(w) (1 - |w| / 2); descent moves against it, so inside the modes |w| grows.
    expected = torch.tensor([[-2.0, 0.0, 0.5, -1.0, -1.0, -0.5, 0.0, 2.0]])
    assert_close(DistancePull().direction(POINTS, K), expected, rtol=0, atol=0)


def test_one_sided_distance_pull_leaves_weights_beyond_the_modes_alone() -> None:
    expected = torch.tensor([[0.0, 0.0, 0.5, -1.0, -1.0, -0.5, 0.0, 0.0]])
    assert_close(DistancePull(one_sided=True).direction(POINTS, K), expected, rtol=0, atol=0)


def test_sign_pull_equals_g2_at_hand_picked_points() -> None:
    expected = torch.tensor([[-1.0, 0.0, 1.0, -1.0, -1.0, -1.0, 0.0, 1.0]])
    assert_close(SignPull().direction(POINTS, K), expected, rtol=0, atol=0)


def test_boundary_pull_equals_g3_at_hand_picked_points() -> None:
    # tau k = 1: exp(-36), exp(-4) = 0.0183156, exp(-1) = 0.3678794, 1.
    half = [0.3678794, 0.0183156, 0.0]
    expected = torch.tensor([[*reversed(half), -1.0, -1.0, *(-value for value in half)]])
    assert_close(BoundaryPull(tau=0.5).direction(POINTS, K), expected, rtol=1e-5, atol=1e-7)


def test_kurtosis_pull_equals_g4_on_a_hand_worked_tensor() -> None:
    # w = (-3, -1, 1, 3): variance 5, Kurt = (81 + 1) / 2 / 25 = 1.64, mean z^3 = 0;
    # z^3 - Kurt z = w (w^2 - 8.2) / 5^1.5 ~ (-2.4, 7.2, -7.2, 2.4), mean magnitude 4.8.
    w = torch.tensor([[-3.0, -1.0, 1.0, 3.0]], dtype=torch.float64)
    k = w.abs().mean(1, keepdim=True)
    expected = torch.tensor([[-0.5, 1.5, -1.5, 0.5]], dtype=torch.float64)
    assert_close(KurtosisPull(target=1.0).direction(w, k), expected)
    assert_close(KurtosisPull(target=1.8).direction(w, k), -expected)


def test_gradient_damping_equals_g5_at_hand_picked_points() -> None:
    pull_in = GradientDamping().damp(POINTS.sign(), POINTS, K, 0.5)
    # Factors 1 - 0.5 max(0, 1 - |w| / 2): 1 at |w| >= 2, 0.75 at 1; w = 0 has no gradient here.
    expected = torch.tensor([[-1.0, -1.0, -0.75, 0.0, 0.0, 0.75, 1.0, 1.0]])
    assert_close(pull_in, expected, rtol=0, atol=0)


def test_distance_pull_is_the_gradient_of_the_squared_distance_to_the_modes() -> None:
    w, k = random_latents()
    w.requires_grad_()
    ((w.abs() - k) ** 2 / (2 * k)).sum().backward()
    assert_close(DistancePull().direction(w.detach(), k), w.grad)


def test_sign_pull_is_the_gradient_of_the_distance_to_the_modes() -> None:
    w, k = random_latents()
    w.requires_grad_()
    (w.abs() - k).abs().sum().backward()
    assert_close(SignPull().direction(w.detach(), k), w.grad)


@given(
    w=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20),
    k=st.floats(2**-10, 10, width=32),
)
def test_boundary_pull_is_bounded_and_vanishes_far_from_the_boundary(
    w: list[float], k: float
) -> None:
    latents, scale = torch.tensor([[*w, 0.0]]), torch.tensor([[k]])
    pull = BoundaryPull(tau=0.5).direction(latents, scale)
    assert pull.abs().max() <= 1
    far = latents.abs() >= 2.5 * k  # exp(-25)
    assert pull[far].abs().sum() <= 1e-10 * len(w)
    assert torch.equal(pull[~far] < 0, latents[~far] >= 0)


@pytest.mark.parametrize("target", [1.0, 1.8, 5.0])
def test_kurtosis_pull_is_the_gradient_of_the_squared_miss_at_unit_mean_magnitude(
    target: float,
) -> None:
    w, k = random_latents()
    w.requires_grad_()
    z = (w - w.mean()) / w.std(correction=0)
    ((z**4).mean() - target).square().backward()
    direction = KurtosisPull(target).direction(w.detach(), k)
    assert w.grad is not None
    assert_close(direction, w.grad / w.grad.abs().mean())
    assert direction.abs().mean().item() == pytest.approx(1)


def test_following_the_kurtosis_pull_reaches_its_target() -> None:
    w, k = random_latents()
    w = w / w.std()
    for _ in range(200):
        w = w - 0.01 * KurtosisPull(1.8).direction(w, k)
    z = (w - w.mean()) / w.std(correction=0)
    assert (z**4).mean().item() == pytest.approx(1.8, abs=0.05)


@given(seed=st.integers(0, 10_000), strength=st.floats(0, 1))
def test_gradient_damping_spares_outward_gradients_and_damps_at_most_by_the_strength(
    seed: int, strength: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, gradient = torch.randn(2, 3, 20, generator=generator, dtype=torch.float64).unbind(0)
    w[:, 0] = 0
    k = w.abs().mean(1, keepdim=True)
    damped = GradientDamping().damp(gradient, w, k, strength)
    outwards = gradient * w <= 0  # descent does not lower |w|
    assert torch.equal(damped[outwards], gradient[outwards])
    share = damped[~outwards] / gradient[~outwards]
    assert share.min() >= 1 - strength - 1e-6
    assert share.max() <= 1


@every_form
@pytest.mark.parametrize("centre", [True, False])
def test_a_row_of_zeros_keeps_finite_gradients(form: Pull | GradientDamping, centre: bool) -> None:
    model = binary_model(centre)
    layer = binary_layers(model)[0]
    layer.weight.data[2] = 0
    GRS(form, 0.3, constant).adjust_gradients(model, 0.5)
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()


@every_form
def test_a_constant_tensor_keeps_finite_gradients(form: Pull | GradientDamping) -> None:
    model = binary_model(centre=False)
    layer = binary_layers(model)[0]
    layer.weight.data.fill_(0.5)
    GRS(form, 0.3, constant).adjust_gradients(model, 0.5)
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()


# Applied to a model.


@every_pull
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_coupled_adds_the_direction_in_units_of_the_mean_gradient(
    form: Pull, schedule: Callable[[float], float]
) -> None:
    model = binary_model()
    before = [layer.weight.grad.clone() for layer in binary_layers(model)]
    weights = [layer.weight.detach().clone() for layer in binary_layers(model)]
    GRS(form, 0.3, schedule).adjust_gradients(model, 0.95)
    for layer, gradient, weight in zip(binary_layers(model), before, weights, strict=True):
        direction = form.direction(*latent_and_scale(weight))
        term = 0.3 * schedule(0.95) * gradient.abs().mean() * direction
        assert term.abs().max() > 0.01
        assert_close(layer.weight.grad, gradient + term, rtol=1e-12, atol=1e-14)
        assert torch.equal(layer.weight, weight)


def test_coupled_damping_replaces_the_gradient() -> None:
    model = binary_model()
    before = [layer.weight.grad.clone() for layer in binary_layers(model)]
    GRS(GradientDamping(), 0.8, cosine_ramp).adjust_gradients(model, 0.5)
    for layer, gradient in zip(binary_layers(model), before, strict=True):
        w, k = latent_and_scale(layer.weight)
        near = (1 - w.abs() / k).clamp(min=0) * (gradient * w > 0)
        assert (near > 0).any() and (near == 0).any()
        assert_close(layer.weight.grad, gradient * (1 - 0.4 * near), rtol=1e-12, atol=1e-14)


@every_pull
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_decoupled_moves_weights_by_the_learning_rate_and_leaves_gradients(
    form: Pull, schedule: Callable[[float], float]
) -> None:
    model = binary_model()
    before = copy.deepcopy(binary_layers(model))
    gradients = [layer.weight.grad.clone() for layer in binary_layers(model)]
    regularizer = GRS(form, 0.3, schedule, decoupled=True)
    regularizer.adjust_gradients(model, 0.95)
    for layer, gradient in zip(binary_layers(model), gradients, strict=True):
        assert torch.equal(layer.weight.grad, gradient)
    regularizer.adjust_weights(model, 0.01, 0.95)
    for layer, old in zip(binary_layers(model), before, strict=True):
        step = 0.01 * 0.3 * schedule(0.95) * form.direction(*latent_and_scale(old.weight))
        assert step.abs().max() > 1e-4
        assert_close(layer.weight.detach(), old.weight.detach() - step, rtol=1e-12, atol=1e-14)


@every_form
def test_coupled_does_not_move_weights(form: Pull | GradientDamping) -> None:
    model = binary_model()
    before = copy.deepcopy(model)
    GRS(form, 0.3, constant).adjust_weights(model, 0.01, 0.5)
    assert all(map(torch.equal, model.parameters(), before.parameters()))


@every_pull
@pytest.mark.parametrize("decoupled", [False, True])
def test_only_binary_weights_are_touched(form: Pull, decoupled: bool) -> None:
    model = binary_model()
    before = copy.deepcopy(model)
    for parameter, other in zip(before.parameters(), model.parameters(), strict=True):
        parameter.grad = other.grad.clone()
    regularizer = GRS(form, 0.3, constant, decoupled)
    regularizer.adjust_gradients(model, 0.5)
    regularizer.adjust_weights(model, 0.01, 0.5)
    binary = {f"{index}.weight" for index in (0, 1)}
    for (name, parameter), old in zip(model.named_parameters(), before.parameters(), strict=True):
        touched = not (torch.equal(parameter, old) and torch.equal(parameter.grad, old.grad))
        assert touched == (name in binary), name


def freeze_first(model: nn.Module) -> nn.Parameter:
    """Freeze the first binary weight."""
    weight = binary_layers(model)[0].weight
    weight.grad = None
    return weight.requires_grad_(False)


@every_form
def test_coupled_leaves_frozen_weights_without_gradient(form: Pull | GradientDamping) -> None:
    model = binary_model()
    frozen, other = freeze_first(model), binary_layers(model)[1].weight
    before = other.grad.clone()
    GRS(form, 0.3, constant).adjust_gradients(model, 0.5)
    assert frozen.grad is None
    assert not torch.equal(other.grad, before)


@every_pull
def test_decoupled_leaves_frozen_weights_where_they_are(form: Pull) -> None:
    model = binary_model()
    frozen, other = freeze_first(model), binary_layers(model)[1].weight
    before = frozen.clone(), other.detach().clone()
    GRS(form, 0.3, constant, decoupled=True).adjust_weights(model, 0.01, 0.5)
    assert not torch.equal(other, before[1])
    assert torch.equal(frozen, before[0])


def test_uncentred_weights_are_pulled_from_their_own_zero() -> None:
    model = binary_model(centre=False)
    layer = binary_layers(model)[0]
    gradient = layer.weight.grad.clone()
    GRS(DistancePull(), 0.3, constant).adjust_gradients(model, 0.0)
    w = layer.weight.detach()
    term = -sign(w) * (1 - w.abs() / w.abs().mean(1, keepdim=True))
    assert_close(layer.weight.grad, gradient + 0.3 * gradient.abs().mean() * term)


def test_decoupled_damping_is_refused() -> None:
    with pytest.raises(ValueError, match="GradientDamping scales gradients"):
        GRS(GradientDamping(), decoupled=True)


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_model_without_binary_weights_is_refused(decoupled: bool) -> None:
    regularizer = GRS(DistancePull(), decoupled=decoupled)
    model = nn.Sequential(QuantLinear(nn.Linear(4, 3), LSQ(QuantSpec(4), (3, 4))), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="the model has none; leave it out"):
        regularizer.adjust_gradients(model, 0.5)


# Schedules.


@pytest.mark.parametrize(
    ("schedule", "values"),
    [(constant, (1, 1, 1)), (cosine_ramp, (0, 0.5, 1)), (last_tenth, (0, 0, 1))],
)
def test_schedules_take_their_values_at_the_start_the_middle_and_the_end(
    schedule: Callable[[float], float], values: tuple[float, ...]
) -> None:
    assert [schedule(p) for p in (0.0, 0.5, 1.0)] == pytest.approx(values)


def test_cosine_ramp_is_half_a_cosine_and_last_tenth_starts_at_nine_tenths() -> None:
    assert cosine_ramp(0.25) == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert [last_tenth(p) for p in (0.89, 0.9)] == [0.0, 1.0]


# Behaviour, on a regression whose binary weights oscillate.


def train_noisy_regression(regularizer: GRS | None, seed: int) -> tuple[int, float, float]:
    """Late sign flips, share of signs that changed, and the loss at the end of training."""
    inputs, outputs, num_steps = 32, 8, 150
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    mix = 0.6 * torch.eye(inputs)
    mix += 0.8 * torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight.data.copy_(0.2 * inputs**0.5 * teacher)
    quantizer = BinaryWeight(QuantSpec(1), (outputs, inputs))
    quantizer.phase = Phase.QUANTIZE
    layer = QuantLinear(linear, quantizer)
    gain = nn.Parameter(torch.ones(outputs))
    optimizer = torch.optim.Adam([linear.weight, gain], lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    signs = [quantizer.codes(linear.weight).values]
    losses = []
    for step in range(num_steps):
        x = torch.randn(32, inputs, generator=generator) @ mix
        noise = 0.5 * torch.randn(32, outputs, generator=generator)
        loss = (gain * layer(x) - x @ teacher.T - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if regularizer is not None:
            regularizer.adjust_gradients(layer, step / num_steps)
        optimizer.step()
        scheduler.step()
        signs.append(quantizer.codes(linear.weight).values)
        losses.append(loss.item())
    late = range(int(0.6 * num_steps), int(0.9 * num_steps))
    flips = sum(int((signs[t + 1] != signs[t]).sum()) for t in late)
    return flips, (signs[-1] != signs[0]).float().mean().item(), sum(losses[-30:]) / 30


def test_distance_pull_lowers_late_flips_and_the_loss_without_freezing_the_signs() -> None:
    # Seen over 8 seeds: 0.46 to 0.63 of the flips, 0.86 to 0.98 of the loss.
    flips, changed, losses = (torch.zeros(5, 2) for _ in range(3))
    for seed in range(5):
        for column, regularizer in enumerate((None, GRS(DistancePull(), 0.3, constant))):
            outcome = train_noisy_regression(regularizer, seed)
            flips[seed, column], changed[seed, column], losses[seed, column] = outcome
    assert (flips[:, 1] < 0.75 * flips[:, 0]).all()
    assert flips[:, 1].sum() < 0.6 * flips[:, 0].sum()
    assert losses[:, 1].mean() < 0.97 * losses[:, 0].mean()
    assert changed[:, 1].mean() > 0.5 * changed[:, 0].mean()

"""The distillation loss: golden values of every term, their sum, and what is refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.train.losses import FeatureTap, Objective, feature_loss, soft_label_loss
from tests.conftest import make_tiny_vit

LN3 = math.log(3)
# Softmax (1/4, 3/4) and (1/2, 1/2) of the student, (1/2, 1/2) and (9/10, 1/10) of the teacher.
STUDENT = torch.tensor([[0.0, LN3], [5.0, 5.0]])
TEACHER = torch.tensor([[2.0, 2.0], [2 * LN3, 0.0]])
LABELS = torch.tensor([1, 0])
HARD = (-math.log(3 / 4) - math.log(1 / 2)) / 2
SOFT = (
    (1 / 2 * math.log(2) + 1 / 2 * math.log(2 / 3))  # 1/2 to 1/4, and 1/2 to 3/4
    + (9 / 10 * math.log(9 / 5) + 1 / 10 * math.log(1 / 5))  # 9/10 to 1/2, and 1/10 to 1/2
) / 2
# Layer `a`: (0.6, 0.8) to (0, 1) is 0.36 + 0.04, the second token has the same direction.
# Layer `b`: one token, opposite directions, 4. A mean over tokens in a layer, then over layers.
STUDENT_FEATURES = {
    "a": torch.tensor([[[3.0, 4.0], [1.0, 1.0]]]),
    "b": torch.tensor([[[0.0, 2.0]]]),
}
TEACHER_FEATURES = {
    "a": torch.tensor([[[0.0, 2.0], [7.0, 7.0]]]),
    "b": torch.tensor([[[0.0, -9.0]]]),
}
FEATURE = ((0.4 + 0.0) / 2 + 4.0) / 2


def logits(*shape: int, seed: int) -> Tensor:
    """Random logits of double precision."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(shape, generator=generator, dtype=torch.float64)


def test_hard_term_is_the_mean_negative_log_probability_of_the_label() -> None:
    terms = Objective().terms(STUDENT, LABELS)
    assert terms.keys() == {"hard", "loss"}
    assert terms["hard"].item() == pytest.approx(HARD, abs=1e-6)
    assert terms["loss"] == terms["hard"]


def test_label_smoothing_mixes_the_label_with_the_uniform_distribution() -> None:
    # -(1 - e) log p_label - e/K sum log p, e = 0.2, K = 2; p = (1/4, 3/4) and (1/2, 1/2).
    first = -0.8 * math.log(3 / 4) - 0.1 * (math.log(1 / 4) + math.log(3 / 4))
    second = -math.log(1 / 2)
    found = Objective(label_smoothing=0.2).terms(STUDENT, LABELS)["hard"]
    assert found.item() == pytest.approx((first + second) / 2, abs=1e-6)


def test_soft_term_is_the_divergence_of_teacher_from_student_averaged_over_images() -> None:
    assert soft_label_loss(STUDENT, TEACHER, 1.0).item() == pytest.approx(SOFT, abs=1e-6)
    # The reverse divergence is another number, so the direction is fixed.
    assert soft_label_loss(TEACHER, STUDENT, 1.0).item() != pytest.approx(SOFT, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_soft_term_divides_logits_by_the_temperature_and_grows_by_its_square(
    temperature: float,
) -> None:
    # T times the logits are at temperature T the distributions of the golden value.
    found = soft_label_loss(temperature * STUDENT, temperature * TEACHER, temperature)
    assert found.item() == pytest.approx(temperature**2 * SOFT, abs=1e-5)
    objective = Objective(hard=0.0, soft=1.0, temperature=temperature)
    terms = objective.terms(temperature * STUDENT, LABELS, temperature * TEACHER)
    assert torch.equal(terms["soft"], found)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_term_of_equal_logits_up_to_a_constant_is_zero(temperature: float) -> None:
    z = logits(6, 10, seed=1).float()
    assert soft_label_loss(z, z.clone(), temperature).item() == 0
    assert soft_label_loss(z, z + 4, temperature).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_gradient_is_the_difference_of_the_distributions(temperature: float) -> None:
    student = logits(5, 7, seed=1).requires_grad_()
    teacher = logits(5, 7, seed=2)
    soft_label_loss(student, teacher, temperature).backward()
    at = [(z.detach() / temperature).softmax(-1) for z in (student, teacher)]
    # d/dz of T^2 KL is T (softmax(z_s / T) - softmax(z_t / T)), over the batch; T = 1 is plain.
    expected = temperature * (at[0] - at[1]) / 5
    torch.testing.assert_close(student.grad, expected, rtol=1e-5, atol=1e-6)


def test_soft_term_lacks_the_entropy_of_the_teacher_from_soft_label_cross_entropy() -> None:
    student, teacher = logits(5, 7, seed=1).float(), logits(5, 7, seed=2).float()
    q, log_p = teacher.softmax(-1), student.log_softmax(-1)
    cross_entropy, entropy = -(q * log_p).sum(-1).mean(), -(q * q.log()).sum(-1).mean()
    found = soft_label_loss(student, teacher, 1.0)
    torch.testing.assert_close(found, cross_entropy - entropy)


def test_logits_of_half_precision_are_compared_in_single_precision() -> None:
    student, teacher = logits(4, 10, seed=1).bfloat16(), logits(4, 10, seed=2).bfloat16()
    objective, labels = Objective(soft=1.0), torch.tensor([1, 2, 3, 4])
    low = objective.terms(student, labels, teacher)
    high = objective.terms(student.float(), labels, teacher.float())
    for name, value in high.items():
        assert low[name].dtype == torch.float32
        assert torch.equal(low[name], value)


def test_feature_term_averages_squared_distances_of_unit_vectors_over_tokens_then_layers() -> None:
    found = feature_loss(STUDENT_FEATURES, TEACHER_FEATURES)
    assert found.item() == pytest.approx(FEATURE, abs=1e-6)


def test_loss_is_the_sum_of_terms_by_their_weights() -> None:
    objective = Objective(hard=0.5, soft=2.0, feature=0.25)
    features = (STUDENT_FEATURES, TEACHER_FEATURES)
    terms = {k: v.item() for k, v in objective.terms(STUDENT, LABELS, TEACHER, features).items()}
    expected = {"hard": HARD, "soft": SOFT, "feature": FEATURE}
    expected["loss"] = 0.5 * HARD + 2 * SOFT + 0.25 * FEATURE
    assert terms == pytest.approx(expected, abs=1e-6)


def test_term_without_weight_is_not_computed() -> None:
    # Inputs for which the terms without a weight could not be computed.
    nothing = ({}, {})
    terms = Objective(hard=0.0, soft=1.0).terms(STUDENT, torch.tensor([9, 9]), TEACHER, nothing)
    assert terms.keys() == {"soft", "loss"}


@pytest.mark.parametrize(
    ("weights", "needed"),
    [
        ({}, False),
        ({"soft": 0.1}, True),
        ({"feature": 0.1}, True),
        ({"hard": 0.0, "soft": 1.0}, True),
    ],
)
def test_teacher_is_needed_exactly_where_a_term_compares_with_it(
    weights: dict[str, float], needed: bool
) -> None:
    assert Objective(**weights).needs_teacher is needed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, r"objective\.temperature must be positive, got 0\.0"),
        ({"temperature": -1.0}, r"objective\.temperature must be positive, got -1\.0"),
        ({"hard": -0.5}, r"not be negative .* got \(-0\.5, 0\.0, 0\.0\)"),
        ({"soft": -1.0}, r"not be negative .* got \(1\.0, -1\.0, 0\.0\)"),
        ({"feature": -1.0}, r"not be negative .* got \(1\.0, 0\.0, -1\.0\)"),
        ({"hard": 0.0}, r"not all zero, got \(0\.0, 0\.0, 0\.0\)"),
    ],
)
def test_impossible_weights_and_temperatures_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**arguments)


def test_tap_holds_the_outputs_of_the_named_modules_of_the_latest_pass() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    tap = FeatureTap(model, "[02]")
    for seed in (1, 2):
        x = logits(5, 3, seed=seed).float()
        y = model(x)
        assert tap.features.keys() == {"0", "2"}
        assert torch.equal(tap.features["0"], model[0](x))
        assert torch.equal(tap.features["2"], y)


def test_tapped_features_carry_the_gradient_of_the_feature_term(
    tiny_vit: nn.Module, images: Tensor
) -> None:
    tap = FeatureTap(tiny_vit, "blocks.0")
    tiny_vit(images)
    feature_loss(tap.features, {"blocks.0": torch.ones(4, 17, 64)}).backward()
    reached = {name for name, p in tiny_vit.named_parameters() if p.grad is not None}
    assert "blocks.0.attn.qkv.weight" in reached
    assert not any(name.startswith(("blocks.1", "norm", "head")) for name in reached)


@pytest.mark.parametrize("depth", [2, 12])
def test_default_feature_layers_are_all_blocks(depth: int, images: Tensor) -> None:
    model = make_tiny_vit(depth=depth)
    tap = FeatureTap(model, Objective().feature_layers)
    model(images)
    assert set(tap.features) == {f"blocks.{i}" for i in range(depth)}


def test_tap_that_matches_nothing_is_refused_with_its_pattern(tiny_vit: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"objective\.feature_layers 'layers\.\*' matches no"):
        FeatureTap(tiny_vit, "layers.*")

"""The balance losses of TTAQ: golden values, signs, and composition with every gradient method."""

from dataclasses import replace
from math import log

import pytest
import torch

from qat.tta import ABL1, ABL2, ABL3, ABL4, ABL1e, Adapter
from qat.tta.balance import Plain
from qat.tta.ops import cross_entropy, entropy
from qat.tta.overlay import Overlay
from qat.tta.ttaq import EPS, offset
from tests.qat.tta.common import BALANCES, GRADIENT, METHODS, clean, knowing, noisy, shared

FREQUENT = {"frequency": torch.tensor([0.9, 0.1]), "complexity": torch.tensor([0.5, 0.5])}
UNDECIDED = torch.zeros(1, 2)


def gradient_of_logits(balance, loss: str = "alone") -> list[float]:  # type: ignore[no-untyped-def]
    """Gradient at z = (0, 0), where class 0 has been predicted nine times in ten."""
    logits = UNDECIDED.clone().requires_grad_()
    if loss == "alone":
        value = balance.alone(FREQUENT, logits)
    else:
        value = balance.against(FREQUENT, logits, UNDECIDED.softmax(1))
    return torch.autograd.grad(value.sum(), logits)[0][0].tolist()


def test_cross_entropy_lowers_the_frequent_class() -> None:
    found = gradient_of_logits(ABL1(tau=1.0), "against")
    assert found == pytest.approx([0.4, -0.4], abs=1e-3)


def test_entropy_of_added_offset_raises_the_frequent_class_and_of_subtracted_lowers_it() -> None:
    # dH/dz_c = -p_c (ln p_c + H) at p = (0.9, 0.1)
    p = torch.tensor([0.9, 0.1])
    wanted = -p * (p.log() - (p * p.log()).sum())
    added = gradient_of_logits(ABL1e(tau=1.0, sign=1))
    assert added == pytest.approx(wanted.tolist(), abs=1e-2) and added[0] < 0
    taken = gradient_of_logits(ABL1e(tau=1.0, sign=-1))
    assert taken == pytest.approx(wanted.flip(0).tolist(), abs=1e-2) and taken[0] > 0


def test_offset_equals_the_formula() -> None:
    frequency, complexity = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.9, 0.3, 0.3])
    wanted = [
        0.5 * log(3 * f + EPS) - 2 * (k - 0.5) for f, k in ((0.7, 0.9), (0.2, 0.3), (0.1, 0.3))
    ]
    assert offset(frequency, complexity, 0.5, 2.0).tolist() == pytest.approx(wanted, abs=1e-5)


def test_balanced_stream_has_next_to_no_offset() -> None:
    for name, balance in BALANCES.items():
        assert balance.offset(balance.start(10)).abs().max() < 1e-3, name  # type: ignore[attr-defined]


def test_statistics_move_as_the_formula_and_absent_classes_keep_their_complexity() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    state = {"frequency": torch.full((3,), 1 / 3), "complexity": torch.tensor([0.2, 0.4, 0.6])}
    new = ABL1(memory=0.9).update(state, logits)
    torch.testing.assert_close(
        new["frequency"], 0.9 * state["frequency"] + 0.1 * logits.softmax(1).mean(0)
    )
    relative = entropy(logits) / log(3)
    wanted = torch.stack(
        (0.9 * 0.2 + 0.1 * relative[:2].mean(), 0.9 * 0.4 + 0.1 * relative[2], torch.tensor(0.6))
    )
    torch.testing.assert_close(new["complexity"], wanted)


def test_pseudo_label_is_taken_from_the_raw_logits() -> None:
    logits = torch.tensor([[0.3, 0.0]])  # adjusted, class 1 would win
    state = {"frequency": torch.tensor([0.05, 0.95]), "complexity": torch.tensor([0.5, 0.5])}
    adjusted = logits + ABL1(tau=1.0).offset(state)
    assert adjusted.argmax() == 1
    wanted = cross_entropy(adjusted, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(ABL1(tau=1.0).alone(state, logits), wanted)


def test_combined_prior_is_that_of_both_statistics() -> None:
    state = {"frequency": torch.tensor([0.8, 0.2]), "complexity": torch.tensor([0.75, 0.0])}
    # 0.8 * 0.25 = 0.2 * 1: a frequent but complex class is as a rare and easy one.
    assert ABL2(tau=1.0).offset(state).abs().max() < 1e-6
    easy = {**state, "complexity": torch.tensor([0.0, 0.0])}
    assert ABL2(tau=1.0).offset(easy).diff().item() == pytest.approx(log(0.2 / 0.8), abs=0.01)


def test_weights_of_images_favour_rare_and_complex_classes_and_have_mean_one() -> None:
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    state = {"frequency": torch.tensor([0.8, 0.2]), "complexity": torch.tensor([0.0, 0.5])}
    loss = ABL3().alone(state, logits) / entropy(logits)
    raw = torch.tensor([1.0 / (1.6 + EPS), 1.5 / (0.4 + EPS)])
    torch.testing.assert_close(loss, raw / raw.mean())


def test_answer_is_adjusted_by_the_fourth_candidate_only() -> None:
    for name, balance in BALANCES.items():
        found = balance.answer(FREQUENT, UNDECIDED)
        if name == "4":
            torch.testing.assert_close(found, UNDECIDED - ABL4().offset(FREQUENT))
            assert found.argmax() == 1
        else:
            assert found is UNDECIDED, name


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("name", [*GRADIENT, "rotta"])
def test_every_candidate_works_over_every_gradient_method(name: str, balance: str) -> None:
    method = replace(METHODS[name], balance=BALANCES[balance])  # type: ignore[call-arg]
    plain = replace(METHODS[name], balance=Plain())  # type: ignore[call-arg]
    states = []
    for each in (method, plain):
        adapter = Adapter(shared(8), each, clean())
        outcomes = [adapter.adapt(batch).outcome for batch in noisy(size=16, sort=True)[:3]]
        assert "adapted" in outcomes and "rolled back" not in outcomes
        states.append(adapter.state)
    frequency = states[0]["method.balance.frequency"]
    assert frequency[0] > 0.11 and frequency.sum().item() == pytest.approx(1, abs=1e-5)
    moved = not torch.equal(states[0]["method.params"], states[1]["method.params"])
    assert moved == (balance != "4")


@pytest.mark.parametrize("balance", BALANCES)
def test_first_state_is_where_the_model_is(balance: str) -> None:
    """Methods that take a step of their own before the first batch, as EATA does, need that."""
    method = replace(METHODS["tent"], balance=BALANCES[balance])  # type: ignore[call-arg]
    model = knowing().to("meta")
    state = method.start(Overlay(model, method.parameters(model)), [])
    assert {name: value.device.type for name, value in state.items()} == dict.fromkeys(
        state, "meta"
    )

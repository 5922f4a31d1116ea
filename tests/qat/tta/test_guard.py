"""The guard: mixing, what counts as a collapse, pauses; goals R5 and R6 on a model of digits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qat.tta import SGD, Adapter, Guard, Outcome, Tent
from qat.tta.guard import COLLAPSE, UNHEARD, Verdict, mixed
from tests.qat.tta.common import GRADIENT, METHODS, clean, labels_of, noisy, shared


def sure(*classes: int) -> Tensor:
    """Logits over four classes, certain of the ones named."""
    return 10 * torch.nn.functional.one_hot(torch.tensor(classes), 4).float()


def test_mixture_does_not_see_the_scale_or_the_offset_of_adapted_logits() -> None:
    source, adapted = torch.randn(6, 4), torch.randn(6, 4)
    found = mixed(source, adapted, 1.0)
    torch.testing.assert_close(mixed(source, 7 * adapted + 3, 1.0), found)
    torch.testing.assert_close(mixed(source, source, 2.0), source - source.mean(1, keepdim=True))
    torch.testing.assert_close(mixed(source, adapted, 0.0), source - source.mean(1, keepdim=True))


def test_mixture_equals_the_formula() -> None:
    source, adapted = torch.tensor([[1.0, -1.0]]), torch.tensor([[-4.0, 4.0]])
    torch.testing.assert_close(mixed(source, adapted, 3.0), torch.tensor([[-0.5, 0.5]]))


def danger(guard: Guard, source: Tensor, adapted: Tensor) -> float:
    """Danger when the same answers have come fifty times."""
    state = guard.start(4)
    for _ in range(50):
        state = guard.observe(state, source, adapted)
    return guard.danger(state)


def test_one_class_for_all_is_a_danger_unless_the_original_sees_one_class_too() -> None:
    varied, constant = sure(0, 1, 2, 3), sure(0, 0, 0, 0)
    blind = Guard(margin=1e9, diversity=0.25)  # to contradiction
    assert danger(blind, varied, constant) > COLLAPSE
    assert danger(blind, constant, constant) == pytest.approx(0.0, abs=1e-6)
    assert danger(blind, constant, varied) == pytest.approx(-2.0, abs=1e-6)
    broad = Guard(margin=1e9, diversity=4.0)
    lost, gained = danger(broad, varied, constant), danger(broad, constant, varied)
    assert lost > 0.1 and gained == pytest.approx(-2 * lost, abs=1e-6)


def test_contradicting_the_original_is_a_danger_only_beyond_its_doubt() -> None:
    other, guard = sure(1, 2, 3, 0), Guard(diversity=1e9)
    assert danger(guard, sure(0, 1, 2, 3), other) > COLLAPSE
    doubtful = 0.01 * sure(0, 1, 2, 3)  # a quarter each: it may be contradicted three times in four
    partly = torch.cat((0.01 * sure(0), other[1:]))
    assert danger(guard, doubtful, partly) < 0.2


def test_more_diverse_answers_excuse_two_margins_of_contradiction_and_no_more() -> None:
    few = sure(0, 0, 0, 0, 0, 0, 0, 0, 1, 1)  # an original that a shift made sure of two classes
    same, more = sure(0, 0, 0, 0, 0, 0, 0, 1, 1, 0), sure(0, 0, 0, 0, 0, 0, 2, 3, 1, 1)
    most = sure(0, 0, 0, 0, 2, 3, 2, 3, 1, 1)
    guard = Guard(margin=0.1, diversity=0.01)
    found = [danger(guard, few, adapted) for adapted in (same, more, most)]
    assert found == pytest.approx([2.0, 0.0, 2.0], rel=0.05, abs=0.05)  # 20, 20, 40 % differ


def test_contradiction_and_lost_diversity_add_up() -> None:
    source, adapted = sure(0, 1, 2, 3, 0, 1, 2, 3, 0, 1), sure(0, 1, 2, 3, 0, 1, 2, 3, 0, 0)
    both = Guard(margin=0.15, diversity=0.05)
    apart = Guard(margin=0.15, diversity=1e9), Guard(margin=1e9, diversity=0.05)
    parts = [danger(guard, source, adapted) for guard in apart]
    assert min(parts) > 0.3
    assert danger(both, source, adapted) == pytest.approx(sum(parts))


def test_above_a_quarter_the_adapted_model_goes_on_unheard_and_above_two_it_starts_anew() -> None:
    guard, classes = Guard(margin=0.3, diversity=1e9), [0, 1, 2, 3] * 5
    source, verdicts = sure(*classes), []
    for num_other in (1, 2, 13):  # of twenty
        adapted = torch.cat((source[1 : num_other + 1], source[num_other:]))
        verdict = Verdict(source, {**guard.start(4), "healthy": torch.tensor(1e6)})
        for _ in range(50):
            verdict = guard.judge(verdict.state, source, adapted)
            if verdict.collapse:
                break
        verdicts.append(verdict)
    heard, unheard, collapsed = verdicts
    alone = mixed(source, source, 0.0)
    assert not torch.equal(heard.logits, alone) and not heard.collapse
    assert torch.equal(unheard.logits, alone) and not unheard.collapse
    assert torch.equal(collapsed.logits, source) and "contradict" in collapsed.collapse


def test_method_is_heard_by_its_healthy_images_and_by_its_health_at_once() -> None:
    guard = Guard(weight=2.0, window=10, probation=8, margin=0.6, diversity=1e9)
    source, other = sure(0, 1, 2, 3), sure(0, 1, 2, 2)
    near = source + 0.1 * torch.arange(4.0)
    state = guard.start(4)
    for healthy in (4, 8):
        verdict = guard.judge(state, source, near)
        state = verdict.state
        assert float(state["healthy"]) == healthy
        weight = 2 * healthy / (healthy + 8)
        torch.testing.assert_close(verdict.logits, mixed(source, near, weight))
    # One answer in four against a certain original: 0.25 moves in by a third, of a margin of 0.6.
    verdict = guard.judge(state, source, other)
    seen = float(verdict.state["contradiction"])
    assert seen == pytest.approx(0.25 * (1 - 0.9**4), rel=1e-2) and not verdict.collapse
    health = 1 - seen / guard.margin / UNHEARD
    healthy = 8 + 4 * health
    assert 0.2 < health < 0.5 and float(verdict.state["healthy"]) == pytest.approx(healthy)
    weight = 2 * health * healthy / (healthy + 8)
    torch.testing.assert_close(verdict.logits, mixed(source, other, weight))


def test_method_long_healthy_weighs_as_much_as_it_may_until_it_collapses() -> None:
    guard, source = Guard(weight=0.5), sure(0, 1, 2, 3)
    state = {**guard.start(4), "healthy": torch.tensor(1e9)}
    adapted = source + 0.1 * torch.arange(4.0)
    verdict = guard.judge(state, source, adapted)
    torch.testing.assert_close(verdict.logits, mixed(source, adapted, 0.5))
    assert float(guard.after_collapse(verdict.state)["healthy"]) == 0


@pytest.mark.parametrize(
    "wrong", [{"weight": -1.0}, {"window": 0}, {"probation": 0}, {"pause": 0}, {"margin": 0.0}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a guard"):
        Guard(**wrong)  # type: ignore[arg-type]


def test_pauses_grow_fourfold_and_the_original_answers_in_them() -> None:
    guard = Guard(pause=2)
    state = guard.start(4)
    lengths = []
    for _ in range(3):
        state = guard.after_collapse(state)
        length = 0
        while guard.pauses(state):
            state, length = guard.resume(state), length + 1
        lengths.append(length)
    assert lengths == [2, 8, 32]
    tested = Adapter(shared(), Tent(optimizer=SGD(lr=10.0)), guard=Guard(pause=2))
    outcomes = []
    for batch in noisy(size=16)[:8]:
        answer = tested.adapt(batch)
        outcomes.append(answer.outcome)
        if answer.outcome in (Outcome.RESET, Outcome.SKIPPED):
            assert torch.equal(answer.logits, tested.source(batch))
            assert torch.equal(tested.state["method.params"], tested.own)
    first = outcomes.index(Outcome.RESET)
    assert outcomes[first + 1 : first + 4] == [Outcome.SKIPPED] * 2 + [Outcome.ADAPTED]


def errors(tested: Adapter, batches: list[Tensor], labels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Error of the adapter and of the original in each batch."""
    rows = []
    for batch, truth in zip(batches, labels, strict=True):
        answers = (tested.adapt(batch).logits, tested.source(batch))
        rows.append([(logits.argmax(1) != truth).float().mean() for logits in answers])
    return torch.tensor(rows).unbind(1)  # type: ignore[return-value]


LATER = [pytest.param(name, marks=pytest.mark.slow) for name in GRADIENT[1:]]
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
FORCED = {"steps too large": (1.0, False), "sorted labels": (1e-2, True)}


@pytest.mark.parametrize("forced", FORCED)
@pytest.mark.parametrize("name", [*GRADIENT[:1], *LATER])
@pytest.mark.parametrize("seed", SEEDS)
def test_forced_collapse_is_found_and_undone(name: str, forced: str, seed: int) -> None:
    lr, sort = FORCED[forced]  # goal R5
    method = replace(METHODS[name], optimizer=SGD(lr=lr))  # type: ignore[call-arg]
    batches, labels = noisy(seed, size=16, sort=sort), labels_of(seed, 16, sort)
    bare, source = errors(Adapter(shared(), method, clean(), seed=seed), batches[:60], labels[:60])
    assert bare[30:].mean() > source[30:].mean() + 0.1, "the collapse was not forced"
    tested = Adapter(shared(), method, clean(), guard=Guard(), seed=seed)
    resets = []
    for number, batch in enumerate(batches[:50]):
        if tested.adapt(batch).outcome is Outcome.RESET:
            resets.append(number)
    assert resets, "no collapse was found within 50 batches"
    guarded, source = errors(tested, batches[50:100], labels[50:100])
    assert guarded.mean() <= source.mean() + 0.01


@pytest.mark.parametrize("forced", FORCED)
@pytest.mark.parametrize("name", [*GRADIENT[:1], *LATER])
@pytest.mark.parametrize("seed", SEEDS)
def test_collapse_of_a_method_that_was_long_trusted_costs_few_answers(
    name: str, forced: str, seed: int
) -> None:
    lr, sort = FORCED[forced]  # goal R6 at the end of a long stream
    method = replace(METHODS[name], optimizer=SGD(lr=lr))  # type: ignore[call-arg]
    tested = Adapter(shared(), method, clean(), guard=Guard(), seed=seed)
    saved = tested.state_dict()
    saved["state"]["guard.healthy"] = torch.tensor(1e6)
    tested.load_state_dict(saved)
    batches, labels = noisy(seed, size=16, sort=sort), labels_of(seed, 16, sort)
    guarded, source = errors(tested, batches[:100], labels[:100])
    assert tested.counts.reset
    assert 16 * (guarded - source).sum() <= 5, "of 1,600"


@pytest.mark.slow
def test_at_most_one_false_alarm_in_ten_thousand_batches_of_clean_images() -> None:
    """A false alarm resets a state that is no worse than the original, on the last 20 batches."""
    tested = Adapter(shared(), Tent(optimizer=SGD(lr=1e-6)), guard=Guard())
    seeds = range(90)
    batches = [batch for seed in seeds for batch in noisy(seed, 0.0, size=16)][:10_000]
    labels = [truth for seed in seeds for truth in labels_of(seed, 16)][:10_000]
    assert len(batches) == 10_000
    false_alarms = 0
    for number, batch in enumerate(batches):
        before = tested.state["method.params"]
        if tested.adapt(batch).outcome is Outcome.RESET:
            recent, truth = (torch.cat(rows[number - 20 : number]) for rows in (batches, labels))
            with torch.no_grad():
                adapted = (tested.on(before, recent).argmax(1) != truth).float().mean()
            source = (tested.source(recent).argmax(1) != truth).float().mean()
            false_alarms += bool(adapted <= source + 0.01)
    assert false_alarms <= 1

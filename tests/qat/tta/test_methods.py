"""Each method does what its file says, and none of the bugs of its reference."""

from dataclasses import replace
from math import log
from statistics import mean

import pytest
import torch
from torch import Tensor

import qat
from qat.card import card_of
from qat.tta import EATA, FOA, LAME, SAR, SGD, Adapter, CoTTA, Outcome, RDumb, RoTTA, Tent
from qat.tta.augment import view
from qat.tta.eata import selected
from qat.tta.foa import _run
from qat.tta.lame import corrected, nearest
from qat.tta.memory import EMPTY, Memory
from qat.tta.ops import cross_entropy, entropy, one_hot
from qat.tta.sar import climbed
from tests.qat.tta.common import FAST, METHODS, adapter, clean, knowing, noisy, same, shared


def params(tested: Adapter) -> Tensor:
    return tested.state["method.params"]


@pytest.mark.parametrize("bits", [None, 4])
def test_tent_steps_equal_those_of_torch_on_a_copy_of_the_model(bits: int | None) -> None:
    tested = Adapter(shared(bits), Tent(optimizer=SGD(lr=1e-2)))
    copy = knowing(bits).requires_grad_(False)
    leaves = [p for n, p in copy.named_parameters() if n in tested.on.names]
    assert len(leaves) == 10
    optimizer = torch.optim.SGD([p.requires_grad_() for p in leaves], lr=1e-2, momentum=0.9)
    for batch in noisy()[:3]:
        logits = copy(batch)
        torch.testing.assert_close(
            tested.adapt(batch).logits, logits.detach(), atol=1e-4, rtol=1e-4
        )
        optimizer.zero_grad()
        entropy(logits).mean().backward()
        optimizer.step()
    found = tested.on.named(params(tested))
    for name, parameter in copy.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [None, 4, 2])
def test_tent_lowers_entropy_and_leaves_the_model_alone(bits: int | None) -> None:
    tested, batch = adapter("tent", bits), torch.cat(noisy()[:8])
    before = {n: p.clone() for n, p in tested.on.model.named_parameters()}
    first, *later = (float(entropy(tested.adapt(batch).logits).mean()) for _ in range(31))
    assert mean(later[-10:]) < first  # of several steps: at two bits single ones go up and down
    assert all(torch.equal(before[n], p) for n, p in tested.on.model.named_parameters())


def test_eata_keeps_reliable_predictions_that_are_not_redundant() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.2, 0.0, 0.1], [0.0, 9.0, 0.0], [8.0, 0.0, 0.0]])
    kept, mean = selected(logits, torch.zeros(3), 0.4, 0.4)
    assert kept.tolist() == [True, False, True, True]
    torch.testing.assert_close(mean, logits.softmax(1)[kept].mean(0))
    kept, after = selected(logits, torch.tensor([1.0, 0.0, 0.0]), 0.4, 0.4)
    assert kept.tolist() == [False, False, True, False]
    torch.testing.assert_close(after, 0.9 * torch.tensor([1.0, 0, 0]) + 0.1 * logits[2].softmax(0))
    kept, unchanged = selected(logits[1:2], mean, 0.4, 0.4)
    assert not kept.any() and unchanged is mean


def test_eata_without_a_kept_image_takes_no_step_whatever_the_momentum() -> None:
    tested = Adapter(shared(), EATA(optimizer=FAST, margin=0.9, similarity=0.95), clean())
    tested.adapt(torch.cat(noisy()[:4]))
    strict = Adapter(shared(), EATA(optimizer=FAST, margin=1e-6), clean())
    strict.load_state_dict(tested.state_dict())
    answer = strict.adapt(noisy()[5])
    assert answer.outcome is Outcome.SKIPPED and answer.num_backward == 0
    assert torch.equal(params(strict), params(tested))


def test_eata_reset_forgets_the_mean_prediction() -> None:
    tested = adapter("eata")
    tested.adapt(torch.cat(noisy()[:4]))
    assert tested.state["method.mean"].any()
    tested.reset()
    assert not tested.state["method.mean"].any()


def test_eata_fisher_is_the_mean_of_squared_gradients_and_holds_the_weights() -> None:
    tested = adapter("eata")
    squares = []
    for images in clean():
        flat = tested.own.clone().requires_grad_()
        logits = tested.on(flat, images)
        loss = cross_entropy(logits, one_hot(logits.detach().argmax(1), 10)).mean()
        squares.append(torch.autograd.grad(loss, flat)[0].square())
    fisher = torch.stack(squares).mean(0)
    torch.testing.assert_close(tested.state["method.fisher"], fisher)
    free, held = (
        Adapter(shared(), EATA(optimizer=FAST, margin=0.9, similarity=2.0, anchor=a), clean())
        for a in (0.0, 1.0)
    )
    for batch in noisy(size=32)[:4]:
        free.adapt(batch)
        held.adapt(batch)
    distances = [float((fisher * (params(a) - a.own).square()).sum()) for a in (free, held)]
    assert distances[1] < distances[0]


def test_eata_with_an_anchor_asks_for_images() -> None:
    with pytest.raises(ValueError, match="needs calibration images"):
        Adapter(shared(), EATA())
    Adapter(shared(), EATA(anchor=0.0))


def test_sar_climbs_by_its_radius_up_the_gradient() -> None:
    start, grad = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0])
    torch.testing.assert_close(climbed(start, grad, 0.5), torch.tensor([1.3, 1.6]))
    assert torch.equal(climbed(start, torch.zeros(2), 0.5), start)


def test_sar_step_equals_the_formula() -> None:
    tested = Adapter(shared(), SAR(optimizer=SGD(lr=0.1), margin=0.6, floor=0.0))
    batch = torch.cat(noisy()[:4])
    start = params(tested)
    limit = 0.6 * log(10)

    def gradient(at: Tensor, rows: Tensor) -> Tensor:
        leaf = at.clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(entropy(tested.on(leaf, rows)).mean(), leaf)[0]

    with torch.no_grad():
        kept = batch[entropy(tested.on(start, batch)) < limit]
        top = climbed(start, gradient(start, kept), 0.05)
        still = kept[entropy(tested.on(top, kept)) < limit]
    answer = tested.adapt(batch)
    assert 0 < answer.num_selected == len(still) < len(batch)
    assert answer.num_backward == len(kept) + len(still)
    torch.testing.assert_close(
        params(tested), start - 0.1 * gradient(top, still), atol=1e-6, rtol=1e-4
    )


def test_sar_without_a_kept_image_takes_no_step_whatever_the_momentum() -> None:
    tested = Adapter(shared(), SAR(optimizer=FAST, margin=0.9, floor=0.0))
    tested.adapt(torch.cat(noisy()[:4]))
    strict = Adapter(shared(), SAR(optimizer=FAST, margin=1e-6, floor=0.0))
    strict.load_state_dict(tested.state_dict())
    assert strict.adapt(noisy()[5]).outcome is Outcome.SKIPPED
    assert torch.equal(params(strict), params(tested))


def test_sar_obeys_its_floor_and_one_collapse_is_one_reset() -> None:
    batch = torch.cat(noisy()[:4])
    calm = Adapter(shared(), SAR(optimizer=FAST, margin=0.9, floor=0.0))
    assert calm.adapt(batch).outcome is Outcome.ADAPTED
    loss = float(calm.state["method.loss"])
    above = Adapter(shared(), SAR(optimizer=FAST, margin=0.9, floor=loss + 0.01))
    answer = above.adapt(batch)
    assert answer.outcome is Outcome.RESET and "below" in answer.reason
    assert above.state["method.loss"] == -1 and torch.equal(params(above), above.own)
    # A running loss far below the floor that is written back would cause a second reset.
    low = Adapter(shared(), SAR(optimizer=SGD(lr=1e-12), margin=0.9, floor=loss - 0.01))
    state = low.state_dict()
    state["state"]["method.loss"] = torch.tensor(loss - 0.5)
    low.load_state_dict(state)
    outcomes = [low.adapt(batch).outcome for _ in range(6)]
    assert outcomes == [Outcome.RESET] + [Outcome.ADAPTED] * 5


@pytest.mark.parametrize(("threshold", "passes"), [(0.0, 3), (1.1, 5)])
def test_cotta_asks_for_views_only_when_the_original_is_unsure(
    threshold: float, passes: int
) -> None:
    tested = Adapter(shared(), CoTTA(optimizer=FAST, views=3, threshold=threshold))
    assert tested.adapt(noisy()[0]).num_forward == passes * 8


def test_cotta_answers_by_its_teacher_who_follows_slowly() -> None:
    tested = Adapter(shared(), CoTTA(optimizer=FAST, threshold=0.0, restore=0.0, follow=0.25))
    first = tested.state["method.teacher"]
    tested.adapt(noisy()[0])
    student, teacher = params(tested), tested.state["method.teacher"]
    torch.testing.assert_close(teacher, 0.75 * first + 0.25 * student)
    assert not torch.equal(teacher, first)
    with torch.no_grad():
        wanted = tested.on(teacher, noisy()[1])
    assert torch.equal(tested.adapt(noisy()[1]).logits, wanted)


def test_cotta_restores_the_share_of_parameters_that_it_says() -> None:
    some, none = (
        Adapter(shared(), CoTTA(optimizer=FAST, threshold=0.0, restore=r)) for r in (0.3, 0.0)
    )
    for tested in (some, none):
        tested.adapt(noisy()[0])
    moved = params(none) != none.own
    restored = (params(some) == some.own)[moved].float().mean()
    assert moved.sum() > 100 and 0.2 < restored < 0.4
    whole = Adapter(shared(), CoTTA(optimizer=FAST, threshold=0.0, restore=1.0))
    whole.adapt(noisy()[0])
    assert torch.equal(params(whole), whole.own)


def test_cotta_can_train_every_weight_of_a_quantized_model_but_no_quantizer() -> None:
    tested = Adapter(shared(4), CoTTA(optimizer=FAST, threshold=0.0, adapts_all=True))
    assert not any("quantizer" in name for name in tested.on.names)
    assert {"head.weight", "blocks.0.attn.qkv.weight", "pos_embed"} <= set(tested.on.names)
    tested.adapt(noisy()[0])
    changed = tested.on.named(params(tested) - tested.own)
    assert changed["blocks.1.mlp.fc1.weight"].any()


def test_views_are_keyed_differ_and_stay_images() -> None:
    images, preprocessing = torch.cat(noisy()[:4]), shared().card.preprocessing
    first, second, other = (
        view(images, preprocessing, torch.Generator().manual_seed(s))
        for s in (1, 1, 2)  # type: ignore[arg-type]
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert first.shape == images.shape and first.abs().max() <= 1
    assert (first - images).abs().mean() > 0.02


def fill(memory: Memory, labels: list[int], uncertainty: float = 0.5) -> None:
    for label in labels:
        memory.add(torch.full((1, 2, 2), float(label)), label, uncertainty)


def memory(capacity: int, num_classes: int) -> Memory:
    found = Memory.empty(capacity, (1, 2, 2), torch.zeros(()))
    found.num_classes = num_classes
    return found


def test_memory_keeps_each_class_to_its_quota() -> None:
    held = memory(4, 2)
    fill(held, [0, 0, 0, 0])
    assert held.labels.tolist().count(0) == 2 and len(held) == 2
    fill(held, [1, 1, 1])
    assert sorted(held.labels.tolist()) == [0, 0, 1, 1]


def test_memory_with_more_classes_than_places_holds_one_of_each_and_drops_the_oldest() -> None:
    held = memory(3, 10)
    fill(held, [4, 5, 6, 7])
    assert sorted(held.labels.tolist()) == [5, 6, 7]


def test_memory_replaces_uncertain_images_and_keeps_certain_ones() -> None:
    held = memory(1, 1)
    fill(held, [0], uncertainty=0.1)
    fill(held, [0], uncertainty=0.9)  # 0.5 + 0.9 exceeds what is there
    assert held.uncertainties.tolist() == pytest.approx([0.1])
    assert held.ages.tolist() == [2]
    fill(held, [0], uncertainty=0.05)
    assert held.uncertainties.tolist() == pytest.approx([0.05])
    assert EMPTY not in held.labels


def test_rotta_learns_after_every_capacity_of_images_and_saves_nothing_in_place() -> None:
    tested = Adapter(shared(), RoTTA(capacity=16), clean())
    before = {name: value.clone() for name, value in tested.initial.items()}
    outcomes = [tested.adapt(batch).outcome for batch in noisy()[:4]]
    assert outcomes == [Outcome.SKIPPED, Outcome.ADAPTED] * 2
    assert same(dict(tested.initial), before)
    assert int(tested.state["method.added"]) == 32


def test_rotta_is_not_wedged_by_a_batch_of_another_shape() -> None:
    tested = Adapter(shared(), RoTTA(capacity=8), clean())
    with pytest.raises(ValueError, match="channels"):
        tested.adapt(torch.zeros(8, 3, 8, 8))
    assert [tested.adapt(batch).outcome for batch in noisy()[:3]] == [Outcome.ADAPTED] * 3


def test_lame_neighbours_equal_brute_force() -> None:
    features = torch.randn(7, 5)
    unit = features / features.norm(dim=1, keepdim=True)
    found = nearest(features, 2)
    for i in range(7):
        order = sorted(
            (j for j in range(7) if j != i), key=lambda j: float((unit[i] - unit[j]).norm())
        )
        assert found[i].nonzero().flatten().tolist() == sorted(order[:2])


def test_lame_makes_neighbours_agree_and_leaves_a_lone_image_alone() -> None:
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    affinity = torch.ones(3, 3) - torch.eye(3)
    found = corrected(p.log(), affinity)
    assert found.argmax(1).tolist() == [0, 0, 0]
    # The fixed point satisfies its own equation.
    again = (p.log() + affinity @ found.exp()).log_softmax(1)
    torch.testing.assert_close(found.exp(), again.exp(), atol=1e-3, rtol=0)
    torch.testing.assert_close(corrected(p[:1].log(), torch.zeros(1, 1)), p[:1].log())


def test_lame_on_equal_images_is_finite() -> None:
    batch = noisy()[0][:1].expand(6, -1, -1, -1)
    assert Adapter(shared(), LAME()).adapt(batch).logits.isfinite().all()


def test_rdumb_is_its_method_until_the_period_is_over() -> None:
    inner = EATA(optimizer=FAST, margin=0.9, similarity=0.95, anchor=0.0)
    tested, free = Adapter(shared(), RDumb(inner, period=3)), Adapter(shared(), inner)
    batches = noisy(size=16)
    for batch in batches[:3]:
        last = tested.adapt(batch)
        assert torch.equal(last.logits, free.adapt(batch).logits)
    assert last.outcome is Outcome.RESET and tested.counts.reset == 1
    assert same(dict(tested.state), dict(tested.initial))
    fresh = Adapter(shared(), inner)
    assert torch.equal(tested.adapt(batches[3]).logits, fresh.adapt(batches[3]).logits)


@pytest.mark.parametrize("bits", [None, 4])
def test_foa_goes_forward_only_and_prefers_prompts_that_lower_its_fitness(bits: int | None) -> None:
    tested = Adapter(shared(bits), FOA(population=8, radius=0.5), clean())
    batch = torch.cat(noisy(strength=0.5)[:8])
    fitness = []
    for _ in range(6):
        answer = tested.adapt(batch)
        assert answer.num_backward == 0 and answer.num_forward == 8 * 64
        with torch.no_grad():
            state = {k.removeprefix("method."): v for k, v in tested.state.items()}
            method = tested.method
            assert isinstance(method, FOA)
            logits, tokens, _ = _run(
                tested.on, method._tokens(tested.on, state["search.mean"]), batch
            )
            fitness.append(float(method._fitness(state, logits, tokens)))
    assert min(fitness[3:]) < fitness[0]


def test_foa_on_the_clean_images_starts_at_the_model() -> None:
    tested = Adapter(shared(), FOA(population=4, radius=0.0), clean())
    images = torch.cat(clean())
    with torch.no_grad():
        state = {k.removeprefix("method."): v for k, v in tested.state.items()}
        assert torch.equal(state["clean.feature"], state["feature"])
    assert tested.adapt(images).outcome is Outcome.ADAPTED


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="population must be at least 4"):
        FOA(population=2)
    with pytest.raises(ValueError, match="period must be at least 1"):
        RDumb(period=0)
    with pytest.raises(ValueError, match="needs calibration images"):
        Adapter(shared(), replace(FOA(), population=4))


@pytest.mark.parametrize("name", ["cotta", "rotta", "foa"])
def test_methods_with_views_or_prompts_adapt_numbers_of_16_bits(name: str) -> None:
    model = knowing().bfloat16()
    tested = Adapter(model, METHODS[name], [batch.bfloat16() for batch in clean()])
    outcomes = [tested.adapt(batch.bfloat16()) for batch in noisy()[:3]]
    assert {found.outcome for found in outcomes} == {Outcome.ADAPTED}


def test_eata_asks_nobody_but_the_head_for_the_number_of_classes() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = knowing()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    pixels, names = card_of(knowing()).preprocessing, [str(i) for i in range(10)]
    model = qat.adopt(Plain().eval(), preprocessing=pixels, class_names=names)
    tested = Adapter(model, METHODS["eata"], clean())
    assert tested.adapt(noisy()[0]).outcome is Outcome.ADAPTED

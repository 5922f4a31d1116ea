"""The adapter: isolation of bad rows, transactions, isolation of streams, small batches."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from qat.tta import Adapter, Guard, Method, Outcome, Source, Tent
from qat.tta.answer import State, Step
from qat.tta.optim import SGD, Optimizer
from tests.qat.tta.common import GRADIENT, METHODS, adapter, clean, knowing, noisy, same, shared

POISONS = {
    "nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "1e30": 1e30, "3e38": 3e38,
}  # fmt: skip


@pytest.mark.parametrize(
    "bits", [None, 2, *(pytest.param(b, marks=pytest.mark.slow) for b in (4, 8))]
)
@pytest.mark.parametrize("name", METHODS)
def test_bad_row_leaves_answers_and_state_as_if_it_had_not_been_there(
    name: str, bits: int | None
) -> None:  # goal R1
    tested, control = adapter(name, bits), adapter(name, bits)
    batches = noisy(size=8)
    for place, (kind, value) in zip((0, 3, 5, 7, 8), POISONS.items(), strict=True):
        good = batches[place]
        bad = good[:1].clone()
        bad[..., place % 8, 0] = value
        answer = tested.adapt(torch.cat((good[:place], bad, good[place:])))
        wanted = control.adapt(good)
        assert answer.refusals[place] in ("nan", "infinite", "magnitude"), kind
        assert answer.logits[place].isnan().all()
        kept = [i for i in range(9) if i != place]
        assert torch.equal(answer.logits[kept], wanted.logits)
        assert answer.logits[kept].isfinite().all()
    assert same(dict(tested.state), dict(control.state))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_bad_row_is_isolated_at_every_place_of_64(name: str) -> None:  # goal R1, in full
    good = torch.cat(noisy(size=63)[:1])
    control = adapter(name)
    wanted = control.adapt(good).logits
    for place in range(64):
        for value in (*POISONS.values(), 1e-42):
            tested = adapter(name, model=control.on.model)
            bad = good[:1].clone()
            bad[0, 0, 0, 0] = value
            answer = tested.adapt(torch.cat((good[:place], bad, good[place:])))
            if value == 1e-42:
                assert answer.logits.isfinite().all()
                continue
            kept = [i for i in range(64) if i != place]
            assert torch.equal(answer.logits[kept], wanted)
            assert same(dict(tested.state), dict(control.state))


def test_batch_of_bad_rows_only_is_answered_by_flags() -> None:
    tested = adapter("tent")
    answer = tested.adapt(torch.full((3, 1, 8, 8), torch.nan))
    assert answer.outcome is Outcome.SKIPPED and answer.refusals == ("nan",) * 3
    assert answer.logits.shape == (3, 10) and answer.logits.isnan().all()
    assert tested.counts.position == 1 and tested.counts.refused == 3


@dataclass(frozen=True)
class Faulty(Optimizer):
    """A descent that fails in a chosen way after the step it was meant to make."""

    fail: Callable[[Tensor, State], tuple[Tensor, State]]

    def start(self, params: Tensor) -> State:
        return SGD().start(params)

    def step(self, params: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
        return self.fail(*SGD(lr=1e-2).step(params, grad, state))


def _nan_in(name: str) -> Callable[[Tensor, State], tuple[Tensor, State]]:
    def fail(params: Tensor, state: State) -> tuple[Tensor, State]:
        target = params if name == "params" else state["direction"]
        target.view(-1)[3] = torch.nan
        return params, state

    return fail


def _raise(error: Exception) -> Callable[[Tensor, State], tuple[Tensor, State]]:
    def fail(params: Tensor, state: State) -> tuple[Tensor, State]:
        raise error

    return fail


FAULTS = {
    "nan in parameters": _nan_in("params"),
    "nan in optimizer": _nan_in("direction"),
    "exception": _raise(ValueError("broken")),
    "out of memory": _raise(torch.OutOfMemoryError("no memory")),
    "memory error": _raise(MemoryError()),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", GRADIENT)
def test_step_that_fails_is_rolled_back_and_answered_by_the_state_before(
    name: str, fault: str
) -> None:  # goals R4, R13
    good = adapter(name)
    batches = noisy()
    good.adapt(batches[0])
    method = replace(METHODS[name], optimizer=Faulty(FAULTS[fault]))  # type: ignore[call-arg]
    faulty = Adapter(good.on.model, method, clean())
    faulty.load_state_dict(good.state_dict())
    before = {key: value.clone() for key, value in faulty.state.items()}
    answer = faulty.adapt(batches[1])
    assert answer.outcome is Outcome.ROLLED_BACK and answer.reason
    assert same(dict(faulty.state), before)
    method_state = {k.removeprefix("method."): v for k, v in before.items()}
    with torch.no_grad():
        wanted = METHODS[name].predict(good.on, method_state, batches[1])
    assert torch.equal(answer.logits, wanted)
    assert faulty.counts.rolled_back == 1 and faulty.counts.position == 2


@dataclass(frozen=True)
class Stumbling(Method):
    """Fails in the forward pass at batches of a list, in the place it says."""

    inner: Method
    where: str
    at: frozenset[int]

    def parameters(self, model: torch.nn.Module) -> list[str]:
        return self.inner.parameters(model)

    def start(self, on, calibration) -> State:  # type: ignore[no-untyped-def]
        return {**self.inner.start(on, calibration), "batch": torch.zeros(())}

    def predict(self, on, state: State, images: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return self.inner.predict(on, state, images)

    def step(self, on, state: State, images: Tensor, generator) -> Step:  # type: ignore[no-untyped-def]
        if self.where == "before" and generator.initial_seed() % 3 == 0:
            raise RuntimeError("before")
        step = self.inner.step(on, state, images, generator)
        if generator.initial_seed() % 3 == 0:
            if self.where == "after":
                raise RuntimeError("after")
            step.logits[0] = torch.nan
        return step


@pytest.mark.parametrize("where", ["before", "after", "logits"])
@pytest.mark.parametrize("name", METHODS)
def test_faults_at_random_batches_cost_the_step_only_and_are_counted(name: str, where: str) -> None:
    tested = Adapter(shared(), Stumbling(METHODS[name], where, frozenset()), clean())
    batches, rolled_back = noisy(size=16)[:12], 0
    for batch in batches:
        before = dict(tested.state)
        answer = tested.adapt(batch)
        assert answer.logits.isfinite().all()
        if answer.outcome is Outcome.ROLLED_BACK:
            rolled_back += 1
            assert same(dict(tested.state), before)
    assert tested.counts.rolled_back == rolled_back > 0
    assert tested.counts.position == len(batches)


def test_interrupt_within_a_step_leaves_the_state_before_it() -> None:
    tested = Adapter(knowing(), Tent(optimizer=Faulty(_raise(KeyboardInterrupt()))))  # type: ignore[arg-type]
    before = dict(tested.state)
    with pytest.raises(KeyboardInterrupt):
        tested.adapt(noisy()[0])
    assert same(dict(tested.state), before) and tested.counts.position == 0


def test_broken_quantizer_scale_gives_flags_never_a_guess() -> None:  # goal R4
    tested = adapter("tent", model=knowing(4))
    tested.adapt(noisy()[0])
    scale = tested.on.model.blocks[1].mlp.fc1.input_quantizer.scale  # type: ignore[index,union-attr]
    exact = scale.detach().clone()
    scale.data.fill_(torch.nan)
    before = dict(tested.state)
    answer = tested.adapt(noisy()[1])
    assert set(answer.refusals) == {"unanswerable"} and answer.logits.isnan().all()
    assert answer.outcome is Outcome.ROLLED_BACK and same(dict(tested.state), before)
    scale.data.copy_(exact)
    assert tested.adapt(noisy()[1]).outcome is Outcome.ADAPTED


@pytest.mark.parametrize("bits", [None, 4])
def test_interleaved_streams_on_one_model_give_what_each_gives_alone(bits: int | None) -> None:
    model = knowing(bits)  # goal R14
    weights = {name: value.clone() for name, value in model.state_dict().items()
               if isinstance(value, Tensor)}  # fmt: skip
    names = list(METHODS)[:8] if bits is None else ["tent", "rotta", "cotta", "sar"]
    streams = {name: noisy(seed)[:3] for seed, name in enumerate(names)}
    together = {name: adapter(name, model=model, seed=i) for i, name in enumerate(names)}
    found = {name: [] for name in names}
    for step in range(3):
        for name in names:
            found[name].append(together[name].adapt(streams[name][step]).logits)
    for i, name in enumerate(names):
        alone = adapter(name, bits, seed=i)
        for batch, logits in zip(streams[name], found[name], strict=True):
            assert torch.equal(alone.adapt(batch).logits, logits), name
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())


def test_streams_in_threads_share_a_model() -> None:
    model = knowing()
    shared = [adapter("tent", model=model, seed=i) for i in range(4)]

    def run(number: int) -> list[Tensor]:
        return [shared[number].adapt(batch).logits for batch in noisy(number)[:6]]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(4)))
    for number, answers in enumerate(found):
        alone = adapter("tent", seed=number)
        for batch, logits in zip(noisy(number)[:6], answers, strict=True):
            torch.testing.assert_close(alone.adapt(batch).logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("name", METHODS)
def test_batches_of_any_size_are_answered(name: str, size: int) -> None:  # goal R15
    tested = adapter(name, guard=Guard())
    for batch in noisy(size=size)[: 8 if size < 64 else 2]:
        answer = tested.adapt(batch)
        assert answer.logits.isfinite().all() and answer.outcome is not Outcome.ROLLED_BACK


@pytest.mark.parametrize("name", METHODS)
def test_reset_returns_to_the_start_and_the_counts_go_on(name: str) -> None:
    tested, fresh = adapter(name), adapter(name)
    for batch in noisy()[:3]:
        tested.adapt(batch)
    tested.reset()
    assert same(dict(tested.state), dict(fresh.state)) and tested.counts.position == 3
    with torch.no_grad():
        state = {k.removeprefix("method."): v for k, v in tested.state.items()}
        logits = METHODS[name].predict(tested.on, state, noisy()[5])
    if name in GRADIENT:
        assert torch.equal(logits, tested.source(noisy()[5]))


@pytest.mark.parametrize("name", METHODS)
def test_state_that_is_saved_and_loaded_continues_bit_for_bit(name: str) -> None:
    whole = adapter(name, guard=Guard(), seed=3)
    batches = noisy()
    for batch in batches[:5]:
        whole.adapt(batch)
    resumed = adapter(name, guard=Guard(), seed=3)
    resumed.load_state_dict(whole.state_dict())
    for batch in batches[5:10]:
        assert torch.equal(resumed.adapt(batch).logits, whole.adapt(batch).logits)
    assert same(dict(resumed.state), dict(whole.state)) and resumed.counts == whole.counts


def test_state_of_another_method_or_with_nan_is_refused() -> None:
    tested = adapter("tent")
    before = dict(tested.state)
    with pytest.raises(ValueError, match="continue with the method and model that saved it"):
        tested.load_state_dict(adapter("eata").state_dict())
    saved = tested.state_dict()
    saved["state"]["method.params"] = saved["state"]["method.params"] * torch.nan
    with pytest.raises(ValueError, match="not finite"):
        tested.load_state_dict(saved)
    assert same(dict(tested.state), before)


def test_source_answers_as_the_model() -> None:
    model = knowing()
    tested = Adapter(model, Source())
    batch = noisy()[0]
    answer = tested.adapt(batch)
    assert torch.equal(answer.logits, model(batch).detach())
    assert answer.outcome is Outcome.KEPT and answer.num_forward == 8

"""The model that adapters share: nothing writes to it, whoever looks at it and when."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.checkpoint import digest
from qat.tta import Adapter, Guard, Outcome
from qat.tta.overlay import Overlay
from tests.qat.tta.common import GRADIENT, METHODS, adapter, knowing, noisy, same

FORWARDS = 2
"""Forward passes of the model that a stream is seen in before anything is asked of it."""


@contextmanager
def answering(model: nn.Module, name: str = "tent", streams: int = 2) -> Iterator[None]:
    """Streams of a method, each in a thread, that adapt without a pause within the block."""
    done, failures = threading.Event(), []
    begun = threading.Barrier(streams + 1)

    def run(seed: int) -> None:
        stream, batches = adapter(name, model=model, seed=seed), noisy(seed)
        stream.adapt(batches[0])
        begun.wait()
        while not done.is_set():
            for batch in batches[:20]:
                answer = stream.adapt(batch)
                if answer.outcome is Outcome.ROLLED_BACK:
                    failures.append(answer.reason)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(streams)]
    for thread in threads:
        thread.start()
    begun.wait()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]


def _wrong(model: nn.Module, folder: Path, num_adapters: int, num_saves: int) -> dict[str, int]:
    """How many new adapters, saved files and plain answers are not those of the model at rest."""
    hash_of, batch = digest(model.state_dict()), noisy(9)[0]
    with torch.no_grad():
        logits = model(batch)
    start = adapter("tent", model=model).own
    wrong = {"adapters": 0, "sources": 0, "files": 0, "forwards": 0}
    with answering(model):
        for number in range(max(num_adapters, num_saves)):
            if number < num_adapters:
                made = Adapter(model, METHODS["tent"])
                wrong["adapters"] += not torch.equal(made.own, start)
                wrong["sources"] += not torch.equal(made.source(batch), logits)
            if number < num_saves:
                qat.save(model, folder / "model.ckpt")
                found = qat.load(folder / "model.ckpt").state_dict()
                wrong["files"] += digest(found) != hash_of
            with torch.no_grad():
                wrong["forwards"] += not torch.equal(model(batch), logits)
    return wrong


def test_adapters_and_files_made_while_others_answer_are_those_of_the_model(
    tmp_path: Path,
) -> None:
    assert not any(_wrong(knowing(4), tmp_path, num_adapters=6, num_saves=2).values())


@pytest.mark.slow
def test_300_adapters_and_60_saves_while_others_answer_are_those_of_the_model(
    tmp_path: Path,
) -> None:
    assert not any(_wrong(knowing(4), tmp_path, num_adapters=300, num_saves=60).values())


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", METHODS)
def test_within_a_forward_pass_of_a_stream_the_model_is_as_it_was(
    name: str, bits: int | None
) -> None:
    """A hook looks at the model in the middle of every pass, where another thread might."""
    model = knowing(bits)
    tested = adapter(name, model=model)
    state, seen = digest(model.state_dict()), []
    block: Any = model.blocks[1]  # type: ignore[index]
    block.register_forward_pre_hook(lambda *_: seen.append(digest(model.state_dict())))
    for batch in noisy()[:3]:
        tested.adapt(batch)
    assert len(seen) >= FORWARDS and set(seen) == {state}
    assert block._forward_pre_hooks and not model.blocks[0]._forward_pre_hooks  # type: ignore[index]


@pytest.mark.parametrize("name", METHODS)
def test_model_in_training_stays_in_training_and_is_adapted_in_evaluation_mode(name: str) -> None:
    model, reference = knowing().train(), adapter(name)
    tested = adapter(name, model=model)
    for batch in noisy()[:2]:
        assert torch.equal(tested.adapt(batch).logits, reference.adapt(batch).logits)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_adapter_that_is_copied_or_pickled_goes_on_alike(name: str) -> None:
    tested, batches = adapter(name, 4, guard=Guard()), noisy(size=4)
    for batch in batches[:2]:
        tested.adapt(batch)
    others = copy.deepcopy(tested), pickle.loads(pickle.dumps(tested))
    for batch in batches[2:4]:
        answer = tested.adapt(batch)
        assert all(torch.equal(other.adapt(batch).logits, answer.logits) for other in others)
    for other in others:
        assert same(dict(other.state), dict(tested.state)) and other.counts == tested.counts


@pytest.mark.parametrize("name", GRADIENT)
def test_step_runs_through_recomputed_activations_to_the_same_state(name: str) -> None:
    """Gradient checkpointing runs blocks a second time, after the forward pass has ended."""
    plain, recomputing = knowing(4), knowing(4)
    recomputing.set_grad_checkpointing()  # type: ignore[operator]
    found = [adapter(name, model=model) for model in (plain, recomputing)]
    for batch in noisy()[:3]:
        first, second = (each.adapt(batch) for each in found)
        assert second.outcome is first.outcome is not Outcome.ROLLED_BACK
        torch.testing.assert_close(first.logits, second.logits)


def _compiled(model: Any) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def _compiled_in_place(model: Any) -> nn.Module:
    model.compile(backend="eager")
    return model


def _of_compiled_blocks(model: Any) -> nn.Module:
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return model


def _patched(model: Any) -> nn.Module:
    block = model.blocks[1]
    block.forward = MethodType(type(block).forward, block)
    return model


@pytest.mark.parametrize("change", [_compiled, _compiled_in_place, _of_compiled_blocks, _patched])
def test_model_that_is_compiled_or_patched_adapts_like_the_plain_one(
    change: Callable[[Any], nn.Module],
) -> None:
    found = [adapter("tent", model=model) for model in (knowing(), change(knowing()))]
    for batch in noisy()[:3]:
        first, second = (each.adapt(batch) for each in found)
        assert second.outcome is Outcome.ADAPTED and torch.equal(first.logits, second.logits)
    assert torch.equal(*(each.state["method.params"] for each in found))


class Tied(nn.Module):
    """Two layers that are one, and a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.again = self.norm
        self.scale = self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.norm(x)) * self.scale


def test_tied_parameters_are_laid_over_wherever_they_are_used() -> None:
    model, x = Tied(), torch.randn(3, 4)
    on = Overlay(model, ["scale"])
    found = on(torch.full((4,), 2.0), x)
    norm = lambda values: nn.functional.layer_norm(values, (4,)) * 2  # noqa: E731
    torch.testing.assert_close(found, norm(norm(x)) * 2)
    assert torch.equal(model.scale, torch.ones(4))

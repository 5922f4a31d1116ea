"""What would keep every batch from adapting is refused at the start, or left by itself."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from qat.tta import EATA, SGD, Adam, Adapter, Guard, Outcome, RDumb, Tent
from tests.qat.tta.common import FAST, METHODS, clean, knowing, noisy

GRADIENT = ["tent", "eata", "sar", "cotta", "rotta", "rdumb"]


@pytest.fixture
def model() -> nn.Module:
    """A model that knows digits, of the test's own."""
    return knowing()


@pytest.mark.parametrize("name", [*GRADIENT, "foa"])
def test_gradient_checkpointing_disturbs_no_method(name: str, model: nn.Module) -> None:
    """Blocks run a second time in the backward pass, on the same adapted values."""
    model.set_grad_checkpointing(True)  # type: ignore[operator]
    adapter = Adapter(model, METHODS[name], clean())
    assert adapter.adapt(noisy()[0]).outcome is Outcome.ADAPTED


class _Wall(Function):
    """A step function without a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


@pytest.mark.parametrize(
    ("stop", "reason"),
    [(_Wall.apply, "zero everywhere"), (Tensor.detach, "no gradient reaches")],
    ids=["zero", "detached"],
)
def test_model_that_lets_no_gradient_through_is_refused(
    stop: Any, reason: str, model: nn.Module
) -> None:
    model.norm.register_forward_hook(lambda *args: stop(args[-1]))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=reason):
        Adapter(model, Tent(optimizer=FAST))


@pytest.mark.parametrize("name", ["tent", "eata", "cotta", "foa"])
def test_inference_mode_is_left_by_itself(name: str, model: nn.Module) -> None:
    answers = []
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context():
            images = noisy()[0].clone()
            adapter = Adapter(model, METHODS[name], clean())
            answers.append(adapter.adapt(images))
            second = adapter.adapt(images)
        assert {answers[-1].outcome, second.outcome} == {Outcome.ADAPTED}
    assert torch.equal(answers[0].logits, answers[2].logits)


def test_parameters_that_require_no_gradient_adapt_all_the_same(model: nn.Module) -> None:
    model.requires_grad_(False)
    assert Adapter(model, Tent(optimizer=FAST)).adapt(noisy()[0]).outcome is Outcome.ADAPTED


@pytest.mark.parametrize("make", [SGD, Adam])
@pytest.mark.parametrize("lr", [0.0, -1e-3, float("nan")])
def test_learning_rate_that_moves_nothing_is_refused(make: Any, lr: float) -> None:
    with pytest.raises(ValueError, match="lr must be above 0"):
        make(lr=lr)


def test_guard_that_hears_no_adapted_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="a weight above 0, or no adapted answer is ever heard"):
        Guard(weight=0.0)


def test_method_inside_another_is_tried_too(model: nn.Module) -> None:
    model.norm.register_forward_hook(lambda *args: args[-1].detach())  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="what EATA adapts"):
        Adapter(model, RDumb(EATA(optimizer=FAST, anchor=0.0), period=3))

"""The pure optimizers are torch's, and leave what they are given as it was."""

from collections.abc import Callable

import pytest
import torch

from qat.tta import SGD, Adam
from qat.tta.optim import Optimizer


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (SGD(lr=0.1, momentum=0.0), lambda p: torch.optim.SGD(p, lr=0.1)),
        (Adam(lr=0.1, betas=(0.8, 0.99)), lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.99))),
    ],
)
def test_ten_steps_equal_torch(
    ours: Optimizer, theirs: Callable[[list[torch.Tensor]], torch.optim.Optimizer]
) -> None:
    start = torch.randn(7)
    params, state = start.clone(), ours.start(start)
    leaf = start.clone().requires_grad_()
    optimizer = theirs([leaf])
    for _ in range(10):
        grad = torch.randn(7)
        before = {name: value.clone() for name, value in state.items()}
        held, old = params, state
        params, state = ours.step(params, grad, state)
        leaf.grad = grad.clone()
        optimizer.step()
        torch.testing.assert_close(params, leaf.detach(), rtol=1e-5, atol=1e-6)
        assert all(torch.equal(old[name], value) for name, value in before.items())
        assert held is not params

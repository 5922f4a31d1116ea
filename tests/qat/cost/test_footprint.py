"""Peak memory by tensors: what counts, what does not."""

import torch

from qat.cost.footprint import Footprint

SIZE = 1024
"""Bytes of `_x`."""


def _x() -> torch.Tensor:
    return torch.zeros(SIZE // 4)


def test_tensors_count_while_they_live() -> None:
    x = _x()
    with Footprint() as footprint:
        y = x + 1
        for _ in range(5):
            y = y + 1  # the old one dies when the new one is there
    assert footprint.peak == 2 * SIZE


def test_views_and_changes_in_place_need_nothing() -> None:
    x = _x()
    with Footprint() as footprint:
        x.view(16, -1).t()[2:].add_(1)
        x.unbind()
    assert footprint.peak == 0


def test_parts_of_one_result_count_once() -> None:
    x = _x()
    with Footprint() as footprint:
        parts = (x + 1).split(8)
    assert len(parts) == 32 and footprint.peak == SIZE


def test_what_a_backward_pass_needs_counts_until_it_is_done() -> None:
    x = _x().requires_grad_()
    with Footprint() as footprint, torch.no_grad():
        x.exp().exp().exp()
    assert footprint.peak == 2 * SIZE
    with Footprint() as footprint:
        y = x.exp().exp().exp()
        kept = footprint.peak
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert kept == 3 * SIZE  # each output is what its gradient is made of
    assert footprint.peak > kept


def test_what_was_there_before_does_not_count() -> None:
    x, y = _x(), _x()
    with Footprint() as footprint:
        x.add_(y)
        del y
        z = x * 2
    assert footprint.peak == z.nbytes == SIZE

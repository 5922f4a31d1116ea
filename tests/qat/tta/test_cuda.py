"""On a GPU: every method adapts there, and answers as on the CPU."""

from dataclasses import replace

import pytest
import torch

from qat.tta import Adapter, Guard, Outcome
from tests.qat.tta.common import BALANCES, METHODS, clean, knowing, noisy

pytestmark = pytest.mark.gpu


def on(device: str, name: str, **more) -> Adapter:
    """An adapter of a method on a device."""
    calibration = [images.to(device) for images in clean()]
    return Adapter(knowing().to(device), METHODS[name], calibration, guard=Guard(), **more)


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("cotta", "rotta", "foa")]
)
def test_answers_are_those_of_the_cpu(name: str) -> None:  # the others draw from the device
    here, there = on("cpu", name), on("cuda", name)
    for images in noisy()[:12]:
        wanted, found = here.adapt(images), there.adapt(images.cuda())
        assert found.outcome is wanted.outcome, found.reason
        torch.testing.assert_close(found.logits.cpu(), wanted.logits, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("name", METHODS)
def test_no_step_fails_and_a_saved_state_goes_on(name: str) -> None:
    first, second = on("cuda", name), on("cuda", name)
    batches = [images.cuda() for images in noisy()[:8]]
    for images in batches[:4]:
        assert first.adapt(images).outcome is not Outcome.ROLLED_BACK
    saved = first.state_dict()
    state = {key: value.cpu() for key, value in saved["state"].items()}
    second.load_state_dict({**saved, "state": state})
    for images in batches[4:]:
        wanted, found = first.adapt(images), second.adapt(images)
        assert found.outcome is not Outcome.ROLLED_BACK, found.reason
        torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("name", ["eata", "sar"])
def test_balances_run(name: str, balance: str) -> None:
    method = replace(METHODS[name], balance=BALANCES[balance])
    adapter = Adapter(knowing(4).cuda(), method, [images.cuda() for images in clean()])
    for images in noisy()[:4]:
        assert adapter.adapt(images.cuda()).outcome is not Outcome.ROLLED_BACK

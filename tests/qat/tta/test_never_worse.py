"""Goal R6: guarded, the methods together lose at most a point, whatever the protocol."""

from dataclasses import replace
from statistics import mean
from typing import Any

import pytest

from qat.card import expected_by
from qat.cli.stream_scores import Scores
from qat.data.corrupted import Generated
from qat.data.protocols import (
    CleanAfterShift,
    Continual,
    Correlated,
    Gradual,
    Mixed,
    Recurring,
    ResetEachShift,
    StreamProtocol,
)
from qat.data.sources import digits
from qat.data.streams import Stream
from qat.models import num_classes_of
from qat.tta import SGD, Adapter, Guard, Source
from tests.qat.tta.common import GRADIENT, METHODS, clean, shared

PROTOCOLS: dict[str, StreamProtocol] = {
    "continual": Continual(),
    "reset each shift": ResetEachShift(),
    "mixed": Mixed(),
    "Dirichlet": Correlated(),
    "sorted": Correlated(delta=None),
    "recurring": Recurring(laps=6),
    "gradual": Gradual(),
    "clean after shift": CleanAfterShift(),
}
LONG = ("recurring", "gradual")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_guarded_methods_lose_at_most_a_point_on_any_corruption(name: str, seed: int) -> None:
    """Steps so large that methods break without the guard, digits on 8 bits.

    An error is a mean over the images of one corruption; the four methods see the same ones, so
    the loss on a corruption is the mean over them.
    """
    model = shared(8)
    images = Generated(digits("test"), "cifar")
    number = 60 if name in LONG else None
    stream = Stream(images, PROTOCOLS[name], expected_by(model), 16, seed, number)
    batches = list(stream.batches())
    reference = Adapter(model, Source())
    exact = [reference.adapt(batch.images).logits for batch in batches]

    def table(method: str, guard: Guard | None) -> list[dict[str, Any]]:
        fast = replace(METHODS[method], optimizer=SGD(lr=1e-3))  # type: ignore[call-arg]
        adapter = Adapter(model, fast, clean(), guard=guard, seed=seed)
        scores = Scores(stream.domains, num_classes_of(model))
        for batch, source in zip(batches, exact, strict=True):
            logits = adapter.adapt(batch.images).logits
            scores.add(logits, source, batch.labels, batch.domains)
        return scores.table()

    def loss(row: dict[str, Any]) -> float:
        return row["error"] - row["error_source"]

    assert mean(map(loss, table("tent", None))) > 0.05, "the method was not broken"
    guarded = [map(loss, table(method, Guard())) for method in GRADIENT]
    losses = [mean(of_methods) for of_methods in zip(*guarded, strict=True)]
    assert mean(losses) <= 0.002
    assert max(losses) <= 0.01

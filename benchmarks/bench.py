"""A model, a stream and methods as `train.py adapt` makes them, for benchmarks of adaptation."""

from dataclasses import replace
from functools import cached_property

import qat
from qat.cli.commands.adapt import StreamSettings, make_stream
from qat.cli.main import open_session
from qat.data.streams import StreamBatch
from qat.models import num_classes_of
from qat.preprocessing import expected_by
from qat.tta import Adapter

RECIPE = "configs/tta/cifar10_vit_tiny.yaml"
PARTS = "configs/tta/parts"


class Bench:
    """A model of `quantize` or `adapt` before the stream of a recipe.

    Args:
        path: Its model.ckpt.
        recipe: A recipe of `configs/tta`.
        parts: Names in `configs/tta/parts` that change the stream.
        seed: Draws images, their order, and what corruptions and methods draw.
        changes: Settings of the stream in place of the recipe's.
    """

    def __init__(
        self, path: str, recipe: str, parts: list[str] | None = None, seed: int = 0, **changes: int
    ) -> None:
        self.seed = seed
        self.words = ["--config", recipe, "--seed_everything", str(seed), *configs(parts or [])]
        self.model = qat.load(path)
        session = open_session("adapt", *self.words)
        self.data = session.data()
        self.data.attach(expected_by(self.model), num_classes_of(self.model))
        settings = StreamSettings(**session.section("stream"))
        self.stream = make_stream(replace(settings, **changes), self.data, self.model, seed)

    @cached_property
    def batches(self) -> list[StreamBatch]:
        """The whole stream, in memory."""
        return list(self.stream.batches())

    def adapter(self, parts: str) -> Adapter:
        """The model with the method, and the guard, of parts such as `tent+guarded`."""
        session = open_session("adapt", *self.words, *configs(parts.split("+")))
        made = session.objects("method", "guard")
        calibration = self.data.calibration_batches()
        return Adapter(self.model, made.method, calibration, guard=made.guard, seed=self.seed)


def configs(parts: list[str]) -> list[str]:
    """Arguments that name the files of parts."""
    return [word for part in parts for word in ("--config", f"{PARTS}/{part}.yaml")]

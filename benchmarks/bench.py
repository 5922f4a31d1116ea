"""A model, a stream and methods as `train.py adapt` makes them, for benchmarks of adaptation."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import qat
from qat.cli.commands.adapt import StreamSettings, make_stream
from qat.cli.grid import named
from qat.cli.main import open_session
from qat.cli.recipe import Part, compose, load_recipe
from qat.data.streams import StreamBatch
from qat.plan import nearest
from qat.tta import Adapter

RECIPE = "configs/tta/cifar10_vit_tiny.yaml"
GRIDS = ("compare", "compare_imagenet", "protocols", "forms")


class Bench:
    """A model of `quantize` or `adapt` before the stream of a recipe.

    Args:
        path: Its model.ckpt.
        recipe: A recipe of `configs/tta`.
        parts: Choices that change the stream, such as `correlated`; see `choice`.
        seed: Draws images, their order, and what corruptions and methods draw.
        changes: Settings of the stream in place of the recipe's.
    """

    def __init__(
        self, path: str, recipe: str, parts: list[str] | None = None, seed: int = 0, **changes: int
    ) -> None:
        self.seed = seed
        session = open_session("adapt", "--config", recipe, "--seed_everything", str(seed))
        self.session = session.overlaid(load_recipe(*map(choice, parts or [])))
        self.model = qat.load(path)
        self.data = self.session.data()
        self.data.follow(self.model)
        settings = StreamSettings(**self.session.section("stream"))
        self.stream = make_stream(replace(settings, **changes), self.data, self.model, seed)

    @cached_property
    def batches(self) -> list[StreamBatch]:
        """The whole stream, in memory."""
        return list(self.stream.batches())

    def adapter(self, parts: str) -> Adapter:
        """The model with the method, and the guard, of choices such as `tent+guarded`."""
        recipe = load_recipe(*map(choice, parts.split("+")))
        made = self.session.overlaid(recipe).objects("method", "guard")
        calibration = self.data.calibration_batches()
        return Adapter(self.model, made.method, calibration, guard=made.guard, seed=self.seed)


def choice(name: str) -> Part:
    """The settings that a grid of `configs/tta` gives a name to.

    Raises:
        ValueError: If there are none.
    """
    known = {
        key: part
        for recipe in GRIDS
        for axis in compose(Path("configs/tta") / f"{recipe}.yaml")["grid"].values()
        for key, part in named(axis).items()
    }
    if name not in known:
        raise ValueError(f"no grid of configs/tta has '{name}'" + nearest(name, known))
    return known[name]

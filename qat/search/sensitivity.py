"""Sensitivity of every component: what a quantized operand costs the output of the model.

A metric maps a converted model and a few images to a table: for each slot (an operand of a linear
layer or of an attention product) and each width b, a non-negative number Omega(b). Numbers of one
table compare with each other, weights with activations included, and add up over slots. The metrics
are in `qat.search.metrics`, one idea a file.

No labels are needed: targets are drawn from the model's own predictions (the true Fisher
information), or are its top predictions. PMQ's own metric is known by its abstract only; that M1 is
it is a *reconstruction*, see `docs/decisions/0006-mixed-precision.md`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

from qat.quantizers.slots import Slot
from qat.search.probe import Probe

Table = Mapping[Slot, Mapping[int, float]]
"""Omega of each slot at each width."""


class Metric(ABC):
    """A way to measure sensitivities; subclasses are frozen dataclasses."""

    @property
    def needs_labels(self) -> bool:
        """True if it cannot do without the labels of the images."""
        return False

    @abstractmethod
    def measure(
        self,
        model: nn.Module,
        probes: Mapping[Slot, Probe],
        images: Float[Tensor, "batch c h w"],
        labels: Int[Tensor, " batch"] | None,
    ) -> dict[Slot, dict[int, float]]:
        """Omega of every probed slot at every width that its probe holds.

        Args:
            model: A model in which the probes are in place.
            probes: The probes, calibrated.
            images: Preprocessed images.
            labels: Their classes, where they are known.
        """

    def __call__(
        self,
        model: nn.Module,
        probes: Mapping[Slot, Probe],
        images: Float[Tensor, "batch c h w"],
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Table:
        """The table of sensitivities, see `measure`.

        Raises:
            ValueError: If labels are needed and there are none.
        """
        if self.needs_labels and labels is None:
            raise ValueError(
                f"the metric {type(self).__name__} with target 'labels' needs the labels of the "
                "calibration images, and there are none; set search.labels, or let the metric do "
                "without: target 'sampled' or 'predicted'"
            )
        return self.measure(model, probes, images, labels)


def parts(
    images: Tensor, labels: Tensor | None, size: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images and labels in parts that fit the memory."""
    for start in range(0, len(images), size):
        stop = start + size
        yield images[start:stop], None if labels is None else labels[start:stop]


def monotone(table: Table) -> dict[Slot, dict[int, float]]:
    """The table with each slot's Omega made non-increasing in the width, and slots in order.

    A wider grid that measures worse than a narrower one gets the narrower one's value.
    """
    found: dict[Slot, dict[int, float]] = {}
    for slot, row in table.items():
        least = float("inf")
        found[slot] = {bits: (least := min(least, row[bits])) for bits in sorted(row)}
    return found


def mean_table(tables: Sequence[Table]) -> dict[Slot, dict[int, float]]:
    """The mean of tables over the same slots and widths."""
    return {
        slot: {bits: sum(table[slot][bits] for table in tables) / len(tables) for bits in row}
        for slot, row in tables[0].items()
    }

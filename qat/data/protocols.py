"""Protocols of test-time adaptation: which image comes when, under which corruption.

A protocol lays out one schedule from the labels of a data set, a batch size and a seed; nothing
else enters, so every method sees the same stream. Batches do not cross from one domain to the next
unless the protocol mixes them; the last one of a domain may be smaller. The order of corruptions
is the official one of ImageNet-C (Hendrycks and Dietterich, ICLR 2019), the settings are those of
the suites that published them; each class names its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from qat.data.corruptions import CORRUPTIONS, Domain

CLEAN = "clean"


@dataclass(frozen=True, eq=False)
class Schedule:
    """A laid out stream.

    Attributes:
        domains: The domains that occur.
        indices: (M,) position in the data set of the image of each row.
        domain_of: (M,) position in `domains` of each row's domain.
        starts: (B + 1,) first row of each batch, then M.
        restarts: Batches before which the protocol resets the method.
    """

    domains: tuple[Domain, ...]
    indices: np.ndarray
    domain_of: np.ndarray
    starts: np.ndarray
    restarts: frozenset[int]


@runtime_checkable
class StreamProtocol(Protocol):
    """What lays out a schedule."""

    def schedule(self, labels: np.ndarray, batch_size: int, seed: int) -> Schedule:
        """The schedule over images with these labels; the seed decides their order."""
        ...


@dataclass(frozen=True)
class Continual:
    """One corruption after another, without reset (CoTTA, Wang et al., CVPR 2022).

    Attributes:
        corruptions: Names in order; `clean` is one too.
        severity: Of every corruption, 1 to 5.
    """

    corruptions: Sequence[str] = CORRUPTIONS
    severity: int = 5

    def schedule(self, labels: np.ndarray, batch_size: int, seed: int) -> Schedule:
        """A segment for each corruption, the images in random order."""
        domains = _domains(self.corruptions, self.severity)
        return _in_turn(domains, labels, batch_size, seed)


@dataclass(frozen=True)
class Arrival:
    """The images as they come, in the order of the data: a camera, a folder of one's own."""

    def schedule(self, labels: np.ndarray, batch_size: int, seed: int) -> Schedule:
        """One segment, in order, without corruption."""
        rows = np.arange(len(labels))
        return _laid_out([(rows, np.zeros_like(rows))], (Domain(CLEAN, 0),), batch_size)


@dataclass(frozen=True)
class ResetEachShift:
    """As `Continual`, the method starting anew with each corruption (Tent, Wang et al., ICLR 2021).

    Attributes:
        corruptions: Names in order.
        severity: Of every corruption, 1 to 5.
    """

    corruptions: Sequence[str] = CORRUPTIONS
    severity: int = 5

    def schedule(self, labels: np.ndarray, batch_size: int, seed: int) -> Schedule:
        """A segment for each corruption, each with a restart before it."""
        domains = _domains(self.corruptions, self.severity)
        return _in_turn(domains, labels, batch_size, seed, resets=True)


@dataclass(frozen=True)
class Gradual:
    """Each corruption rises and falls: severities 1 2 3 4 5 4 3 2 1 (CoTTA).

    Attributes:
        corruptions: Names in order.
    """

    corruptions: Sequence[str] = CORRUPTIONS

    def schedule(self, labels: np.ndarray, batch_size: int, seed: int) -> Schedule:
        """Nine segments for each corruption, all images in each."""
        levels = (1, 2, 3, 4, 5, 4, 3, 2, 1)
        every = [_domains(self.corruptions, severity) for severity in levels]
        domains = [domain for of_one in zip(*every, strict=True) for domain in of_one]
        return _in_turn(domains, labels, batch_size, seed)


@dataclass(frozen=True)
class Mixed:
    """All corruptions at once, in random order (SAR, Niu et al., ICLR 2023).

    Attributes:
        corruptions: Names.
        severity: Of every corruption, 1 to 5.
    """

    corruptions: Sequence[str] = CORRUPTIONS
    severity: int = 5

    def schedule(self, labels: np.ndarray, batch_size: int, seed: int) -> Schedule:
        """One segment with every image under every corruption."""
        domains = _domains(self.corruptions, self.severity)
        rows = np.random.default_rng((seed, 0)).permutation(len(domains) * len(labels))
        return _laid_out([(rows % len(labels), rows // len(labels))], domains, batch_size)


@dataclass(frozen=True)
class Correlated:
    """Labels come in runs: within each corruption they are drawn apart over slots of time.

    The images of each class are shared out over min(classes, 100) slots by Dirichlet(delta), as in
    RoTTA (Yuan et al., CVPR 2023, delta 0.1): the smaller delta, the fewer slots a class fills.

    Attributes:
        delta: Concentration of the Dirichlet distribution; None sorts the images by label.
        corruptions: Names in order.
        severity: Of every corruption, 1 to 5.
    """

    delta: float | None = 0.1
    corruptions: Sequence[str] = CORRUPTIONS
    severity: int = 5

    def __post_init__(self) -> None:
        if self.delta is not None and not self.delta > 0:
            raise ValueError(f"delta must be positive, or null to sort by label; got {self.delta}")

    def schedule(self, labels: np.ndarray, batch_size: int, seed: int) -> Schedule:
        """A segment for each corruption, another order of labels in each.

        Raises:
            ValueError: If labels are drawn apart, and no two images have the same.
        """
        if self.delta is not None and 1 < len(labels) == len(np.unique(labels)):
            raise ValueError(
                f"no two of the {len(labels)} images share a class, so none come in runs; take "
                "more images, or another protocol"
            )
        domains = _domains(self.corruptions, self.severity)
        segments = []
        for number in range(len(domains)):
            order = self._order(labels, np.random.default_rng((seed, number)))
            segments.append((order, np.full(len(order), number)))
        return _laid_out(segments, domains, batch_size)

    def _order(self, labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        shuffled = generator.permutation(len(labels))
        classes = np.unique(labels)
        members = [shuffled[labels[shuffled] == c] for c in classes]
        if self.delta is None:
            return np.concatenate(members)
        num_slots = min(len(classes), 100)
        slots: list[list[np.ndarray]] = [[] for _ in range(num_slots)]
        for images in members:
            shares = generator.dirichlet(np.full(num_slots, self.delta))
            cuts = np.rint(np.cumsum(shares)[:-1] * len(images)).astype(int)
            for slot, part in zip(slots, np.split(images, cuts), strict=True):
                slot.append(part)
        parts = [slot[i] for slot in slots for i in generator.permutation(len(slot))]
        return np.concatenate(parts)


@dataclass(frozen=True)
class Recurring:
    """`Continual`, lap after lap, never reset; pixels repeat, orders do not (RDumb, PeTTA).

    Attributes:
        laps: How many times.
        corruptions: Names in order.
        severity: Of every corruption, 1 to 5.
    """

    laps: int = 10
    corruptions: Sequence[str] = CORRUPTIONS
    severity: int = 5

    def __post_init__(self) -> None:
        if self.laps < 1:
            raise ValueError(f"laps must be at least 1, got {self.laps}")

    def schedule(self, labels: np.ndarray, batch_size: int, seed: int) -> Schedule:
        """The segments of `Continual`, `laps` times."""
        domains = _domains(self.corruptions, self.severity) * self.laps
        return _in_turn(domains, labels, batch_size, seed)


@dataclass(frozen=True)
class CleanAfterShift:
    """The clean images follow every corruption: what was forgotten (EATA, Niu et al., ICML 2022).

    Attributes:
        corruptions: Names in order.
        severity: Of every corruption, 1 to 5.
    """

    corruptions: Sequence[str] = CORRUPTIONS
    severity: int = 5

    def schedule(self, labels: np.ndarray, batch_size: int, seed: int) -> Schedule:
        """Two segments for each corruption."""
        corrupted = _domains(self.corruptions, self.severity)
        domains = [d for domain in corrupted for d in (domain, Domain(CLEAN, 0))]
        return _in_turn(domains, labels, batch_size, seed)


def _domains(corruptions: Sequence[str], severity: int) -> list[Domain]:
    if not corruptions:
        raise ValueError("a protocol needs at least one corruption")
    return [Domain(name, 0 if name == CLEAN else severity) for name in corruptions]


def _in_turn(
    segments: Sequence[Domain],
    labels: np.ndarray,
    batch_size: int,
    seed: int,
    resets: bool = False,
) -> Schedule:
    """All images in each domain in turn, in an order of its own."""
    domains = list(dict.fromkeys(segments))
    size = len(labels)
    rows = [
        (np.random.default_rng((seed, i)).permutation(size), np.full(size, domains.index(domain)))
        for i, domain in enumerate(segments)
    ]
    return _laid_out(rows, domains, batch_size, resets)


def _laid_out(
    segments: Sequence[tuple[np.ndarray, np.ndarray]],
    domains: Sequence[Domain],
    batch_size: int,
    resets: bool = False,
) -> Schedule:
    """Cut segments of (indices, domains) into batches."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    starts, restarts, row = [], [], 0
    for indices, _ in segments:
        restarts.append(len(starts))
        starts.extend(range(row, row + len(indices), batch_size))
        row += len(indices)
    return Schedule(
        domains=tuple(domains),
        indices=np.concatenate([indices for indices, _ in segments]).astype(np.int64),
        domain_of=np.concatenate([numbers for _, numbers in segments]).astype(np.int16),
        starts=np.asarray([*starts, row]),
        restarts=frozenset(restarts) if resets else frozenset(),
    )

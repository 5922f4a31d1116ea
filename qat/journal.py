"""Where a long initialisation reports its progress and keeps what it has finished.

`NoJournal` listens and forgets. The command line passes one that shows a progress bar with the
time left, writes the losses to a file, and lets an interrupted run continue.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, final


class Journal(ABC):
    """Hears of parts, such as the stages of a model, and of the steps within each."""

    @abstractmethod
    def note(self, key: str, value: Any) -> None:
        """A fact about the run as a whole, such as the bytes of activations it keeps."""

    @abstractmethod
    def begin(self, part: str, num_steps: int, parts_left: int) -> None:
        """A part begins; as many steps for each of `parts_left` others follow, about."""

    @abstractmethod
    def step(self, part: str, step: int, losses: Mapping[str, float]) -> None:
        """A step of the part was made, at these values of the terms of its loss."""

    @abstractmethod
    def finish(self, part: str, state: Mapping[str, Any]) -> None:
        """A part has ended with this state, all it takes to skip it in a run that continues."""

    @abstractmethod
    def finished(self, part: str) -> Mapping[str, Any] | None:
        """What `finish` was given by the run that this one continues, if it came so far."""


@final
class NoJournal(Journal):
    """Listens and forgets."""

    def note(self, key: str, value: Any) -> None:
        """Nothing is kept."""

    def begin(self, part: str, num_steps: int, parts_left: int) -> None:
        """Nothing is shown."""

    def step(self, part: str, step: int, losses: Mapping[str, float]) -> None:
        """Nothing is kept."""

    def finish(self, part: str, state: Mapping[str, Any]) -> None:
        """Nothing is kept."""

    def finished(self, part: str) -> None:
        """Nothing was."""
        return None

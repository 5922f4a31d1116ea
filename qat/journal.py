"""Where a long initialisation reports its progress and keeps what it has finished.

The base class listens and forgets. The command line passes one that shows a progress bar with the
time left, writes the losses to a file, and lets an interrupted run continue.
"""

from collections.abc import Mapping
from typing import Any


class Journal:
    """Hears of parts, such as the stages of a model, and of the steps within each."""

    def note(self, key: str, value: Any) -> None:
        """A fact about the run as a whole, such as the bytes of activations it keeps."""

    def begin(self, part: str, num_steps: int, parts_left: int) -> None:
        """A part begins; as many steps for each of `parts_left` others follow, about."""

    def step(self, part: str, step: int, losses: Mapping[str, float]) -> None:
        """A step of the part was made, at these values of the terms of its loss."""

    def finish(self, part: str, state: Mapping[str, Any]) -> None:
        """A part has ended with this state, all it takes to skip it in a run that continues."""

    def finished(self, part: str) -> Mapping[str, Any] | None:
        """What `finish` was given by the run that this one continues, if it came so far."""
        return None

"""Runs an adapter over a stream: scores, a row a batch, a state that survives a crash."""

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.card import card_of
from qat.cli.predictions import predicted, refused
from qat.cli.stream_scores import Agreement, Scores
from qat.cli.tables import GrowingTable
from qat.cost.footprint import Footprint
from qat.data.streams import Stream, StreamBatch
from qat.models import num_classes_of
from qat.reading import Refusals
from qat.tta import Adapter, Answer
from qat.tta.parts import part, with_part
from qat.tta.store import Store, require_like, require_tensors_like

WEIGHED = 8
"""Batches from the start of a stream in which memory is counted."""


class Adaptation:
    """A run of an adapter over a stream, in a folder.

    Args:
        adapter: The adapting model.
        stream: The stream.
        store: Where its state is saved.
        table: The file with a row a batch.
        save_every: Batches between two saves.
        predictions: The file with a row an image, for a stream without labels.
    """

    def __init__(
        self,
        adapter: Adapter,
        stream: Stream,
        store: Store,
        table: Path,
        save_every: int,
        predictions: Path | None = None,
    ) -> None:
        self.adapter, self.stream = adapter, stream
        self.store, self.table, self.save_every = store, GrowingTable(table), save_every
        size = num_classes_of(adapter.on.model)
        self.scores = Scores(stream.domains, size) if predictions is None else Agreement()
        self.predictions = None if predictions is None else GrowingTable(predictions)
        self.names = card_of(adapter.on.model).class_names or [str(i) for i in range(size)]
        self.answers: list[dict[str, Any]] = []
        self.seconds = {"adapted": 0.0, "source": 0.0}
        self.bytes = {"adapted": 0, "source": 0}
        self.num_unsaved = 0
        self.first_failure = ""
        self.refused = Refusals("it is refused and counts as wrong")
        self.rows: list[dict[str, Any]] = []

    def resume(self) -> list[str]:
        """Continue from the newest state that is whole; the table loses the rows after it.

        Returns:
            What was wrong with newer states.

        Raises:
            ValueError: If the table does not have the rows that the state says are done.
        """
        tensors, items, problems = self.store.load()
        require_like(items, self._kept(), "items")
        scores, counts = dict(part(tensors, "scores")), items["counts"]
        require_tensors_like(scores, self.scores.tensors)
        self.adapter.load_state_dict({"state": part(tensors, "adapter"), "counts": counts})
        self.scores.tensors = scores
        self.seconds, self.bytes = items["seconds"], items["bytes"]
        self.num_unsaved = items["num_unsaved"]
        self.first_failure = items["first_failure"]
        self.table.resume(items["table"])
        if self.predictions is not None:
            self.predictions.resume(items["predictions"])
        return problems

    def run(self, after: Callable[[dict[str, Any]], None], num_workers: int = 0) -> None:
        """Adapt from where the run is to the end of the stream.

        Args:
            after: Called with the row of each batch when that is done.
            num_workers: Processes that make batches ahead of time.
        """
        for batch in self.stream.batches(self.adapter.counts.position, num_workers):
            row = self._batch(batch)
            self.rows.append(row)
            done = batch.position + 1
            if done % self.save_every == 0 or done == len(self.stream):
                self._save()
            after(row)

    def _batch(self, batch: StreamBatch) -> dict[str, Any]:
        if batch.position in self.stream.restarts:
            self.adapter.reset()
        self.refused.add(filter(None, batch.faults))
        images = batch.images.to(self.adapter.on.like.device)
        weigh = batch.position < WEIGHED
        # Refused rows are NaN, of which a quantizer can make an index; their answers are not used.
        sound = images.nan_to_num()
        source, seconds_source = self._measured("source", self.adapter.source, sound, weigh)
        answer, seconds = self._measured("adapted", self.adapter.adapt, images, weigh)
        self.first_failure = self.first_failure or (
            answer.reason if answer.outcome == "rolled back" else ""
        )
        logits = answer.logits.cpu()
        scored = self.scores.add(logits, source.cpu(), batch.labels, batch.domains)
        if self.predictions is not None:
            self.answers += self._predicted(logits, batch, _faults(answer, batch))
        return {
            "position": batch.position,
            "domain": "+".join(dict.fromkeys(batch.domains)),
            "n_images": len(batch.labels),
            "n_refused": sum(reason is not None for reason in answer.refusals),
            **scored,
            "outcome": str(answer.outcome),
            "n_selected": answer.num_selected,
            "n_forward": answer.num_forward,
            "n_backward": answer.num_backward,
            "digest": hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16],
            "reason": _reasons(answer, batch),
            "seconds": round(seconds, 4),
            "seconds_source": round(seconds_source, 4),
        }

    def _predicted(
        self, logits: Tensor, batch: StreamBatch, faults: list[str | None]
    ) -> Iterator[dict[str, Any]]:
        for row, index, fault in zip(logits, batch.indices.tolist(), faults, strict=True):
            name = self.stream.file(index)
            yield predicted(name, row, self.names) if fault is None else refused(name, fault)

    def _measured(
        self, who: str, function: Callable[[Tensor], Any], images: Tensor, weigh: bool
    ) -> tuple[Any, float]:
        """What a function makes of a batch, and seconds; adds up time and keeps peak memory."""
        footprint = Footprint()
        started = time.perf_counter()
        with footprint if weigh else nullcontext():
            result = function(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        seconds = time.perf_counter() - started
        self.seconds[who] += seconds
        self.bytes[who] = max(self.bytes[who], footprint.peak)
        return result, seconds

    def _save(self) -> None:
        """Save everything as one, the rows first; a disk that fails does not stop the stream."""
        state = self.adapter.state
        tensors = with_part(with_part({}, "adapter", state), "scores", self.scores.tensors)
        try:
            self.table.add(self.rows)
            self.rows.clear()
            if self.predictions is not None:
                self.predictions.add(self.answers)
                self.answers.clear()
            self.store.save(tensors, self._kept())
        except OSError as error:
            self.num_unsaved += 1
            warnings.warn(
                f"the state at batch {self.adapter.counts.position} could not be saved ({error}); "
                "adapting goes on in memory, the last saved state is whole",
                stacklevel=2,
            )

    def _kept(self) -> dict[str, Any]:
        """Plain data that is saved beside the tensors."""
        tables = {"table": self.table, "predictions": self.predictions}
        return {
            **{name: table.state() for name, table in tables.items() if table is not None},
            "counts": asdict(self.adapter.counts),
            "seconds": self.seconds,
            "bytes": self.bytes,
            "num_unsaved": self.num_unsaved,
            "first_failure": self.first_failure,
        }

    def items(self) -> dict[str, Any]:
        """The results, for `metrics.json`; call it when the stream has ended."""
        counts = self.adapter.counts
        images = max(counts.images - counts.refused, 1)
        return {
            **self.scores.summary(),
            "n_batches": counts.position,
            "n_adapted": counts.adapted,
            "n_skipped": counts.skipped,
            "n_rolled_back": counts.rolled_back,
            "n_reset": counts.reset,
            "n_unsaved": self.num_unsaved,
            "first_failure": self.first_failure,
            **self._never_adapted(),
            "n_forward": counts.forward,
            "n_backward": counts.backward,
            "selected_share": counts.selected / images,
            "seconds_adaptation": round(self.seconds["adapted"], 3),
            "seconds_source": round(self.seconds["source"], 3),
            "seconds_ratio": self.seconds["adapted"] / max(self.seconds["source"], 1e-9),
            "state_bytes": sum(value.nbytes for value in self.adapter.state.values()),
            **memory_items(self.adapter, self.bytes["adapted"], self.bytes["source"]),
        }

    def _never_adapted(self) -> dict[str, str]:
        """Why no batch of a method that adapts did so; nothing where one did."""
        counts = self.adapter.counts
        if counts.adapted or not self.adapter.method.adapts:
            return {}
        parts = {
            f"rolled back ({self.first_failure})": counts.rolled_back,
            "skipped, with nothing in them worth a step": counts.skipped,
            "followed by a reset": counts.reset,
        }
        found = [f"{count} were {what}" for what, count in parts.items() if count]
        return {"never_adapted": f"of {counts.position} batches {', '.join(found)}"}


def memory_items(adapter: Adapter, peak: int, peak_source: int) -> dict[str, int | float]:
    """Bytes of adapting and of inference: model, first and present state, peak of a batch."""
    model = adapter.on.model
    weights = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    states = [*adapter.initial.values(), *adapter.state.values()]
    adapted = weights + sum(value.nbytes for value in states) + peak
    source = weights + peak_source
    return {
        "memory_bytes": adapted,
        "memory_source_bytes": source,
        "memory_ratio": adapted / source,
    }


def _reasons(answer: Answer, batch: StreamBatch) -> str:
    """Why the step failed, if it did, and why images were refused."""
    return "; ".join(filter(None, [answer.reason, *_faults(answer, batch)]))


def _faults(answer: Answer, batch: StreamBatch) -> list[str | None]:
    """Why each image was refused: its file's fault first."""
    refused = zip(batch.faults, answer.refusals, strict=True)
    return [fault or why for fault, why in refused]

"""What is on the disk is whole: the old file or the new one, on any filesystem, full or not."""

import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import qat
from qat import disk
from qat.cli.charts.search import frontier_chart
from qat.cli.charts.theme import save_png
from qat.cli.curves import Curves
from qat.cli.progress import RunJournal
from qat.cli.run_folder import RunFolder
from qat.cli.tables import GrowingTable, read_table
from qat.lightning.checkpoint_io import WholeFiles
from qat.tta.store import Store
from tests.conftest import make_tiny_vit
from tests.qat.common import plan


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """No file can grow beyond so many bytes within the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _model(folder: Path, number: int) -> None:
    model = make_tiny_vit()
    torch.nn.init.constant_(model.head.bias, number)  # type: ignore[union-attr, arg-type]
    qat.save(model, folder / "model.ckpt")


def _training(folder: Path, number: int) -> None:
    content = {"state_dict": {"weight": torch.full((4000,), float(number))}}
    WholeFiles().save_checkpoint(content, folder / "checkpoints" / "best.ckpt")


def _stage(folder: Path, number: int) -> None:
    RunJournal(folder, Console(quiet=True)).finish("head", {"weight": torch.full((4000,), number)})


def _stream(folder: Path, number: int) -> None:
    store = Store(folder, {})
    if number > 1:
        store.load()
    store.save({"weight": torch.full((4000,), number)}, {"number": number})


def _metrics(folder: Path, number: int) -> None:
    RunFolder(folder).write_metrics({"number": number, "table": [{"row": i} for i in range(999)]})


def _plan(folder: Path, number: int) -> None:
    rules = plan(4).to_list() * 40
    qat.Plan.from_list([{**rule, "optional": True} for rule in rules]).save(folder / "plan.yaml")


def _picture(folder: Path, number: int) -> None:
    rows = [{"bops": float(cost), "loss": 1.0 / (cost + number)} for cost in range(1, 9)]
    save_png([frontier_chart(rows, (1.0, 1.0), None, "bops")], folder / "frontier.png")


def _curves(folder: Path, number: int) -> None:
    curves = Curves(folder / "metrics.csv", [])
    for step in range(500):
        curves.log_metrics({"loss": float(number)}, step)
    curves.save()


def _content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


KINDS = {
    "model": _model, "training checkpoint": _training, "stage": _stage, "stream": _stream,
    "metrics": _metrics, "plan": _plan, "picture": _picture, "curves": _curves,
}  # fmt: skip


@pytest.mark.parametrize("after", [0, 3000])
@pytest.mark.parametrize("kind", KINDS)
def test_full_disk_leaves_the_last_good_file_and_nothing_else(
    tmp_path: Path, kind: str, after: int
) -> None:
    KINDS[kind](tmp_path, 1)
    before = _content(tmp_path)
    assert any(len(content) > 3000 for content in before.values())
    with full_disk(after), pytest.raises(OSError, match="File too large"):
        KINDS[kind](tmp_path, 2)
    assert _content(tmp_path) == before
    KINDS[kind](tmp_path, 2)


def test_full_disk_leaves_no_torn_first_file(tmp_path: Path) -> None:
    for kind, save in KINDS.items():
        (tmp_path / kind).mkdir()
        with full_disk(3000), pytest.raises(OSError, match="File too large"):
            save(tmp_path / kind, 1)
        assert not _content(tmp_path / kind)


def test_model_on_a_full_disk_is_the_one_saved_last(tmp_path: Path) -> None:
    _model(tmp_path, 1)
    with full_disk(3000), pytest.raises(OSError, match="File too large"):
        _model(tmp_path, 2)
    assert (qat.load(tmp_path / "model.ckpt").head.bias == 1).all()  # type: ignore[union-attr, operator]


def _save_for_ever(save: Callable[[Path, int], None], folder: Path) -> None:
    for number in range(1, 10**9):
        save(folder, number)


def _other_filesystem(than: Path) -> Path:
    for folder in map(Path, ("/dev/shm", "/tmp", "/var/tmp")):
        if folder.is_dir() and folder.stat().st_dev != than.stat().st_dev:
            return folder
    pytest.skip("there is one filesystem only")


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        ("model", lambda folder: qat.load(folder / "model.ckpt")),
        (
            "training checkpoint",
            lambda folder: torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True),
        ),
    ],
)
def test_5_kills_during_saves_lose_nothing_where_temporary_files_are_elsewhere(
    tmp_path: Path, kind: str, read: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(_other_filesystem(tmp_path)))
    generator, context = random.Random(0), multiprocessing.get_context("fork")
    KINDS[kind](tmp_path, 0)
    for _ in range(5):
        process = context.Process(target=_save_for_ever, args=(KINDS[kind], tmp_path))
        process.start()
        time.sleep(generator.uniform(0.1, 0.4))
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()
        assert process.exitcode == -signal.SIGKILL
        read(tmp_path)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_block_that_raises_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    disk.write(tmp_path / "file", "old")
    with pytest.raises(type(error)), disk.replacing(tmp_path / "file") as file:
        file.write(b"new")
        raise error
    assert _content(tmp_path) == {"file": b"old"}


def test_link_goes_on_pointing_to_the_file_it_is_of(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    disk.write(target, "old")
    link.symlink_to(target)
    disk.write(link, "new")
    assert link.is_symlink() and target.read_text() == "new"


def test_file_may_be_read_by_those_whom_the_umask_admits(tmp_path: Path) -> None:
    disk.write(tmp_path / "ours", "")
    (tmp_path / "plain").touch()
    modes = {(tmp_path / name).stat().st_mode for name in ("ours", "plain")}
    assert len(modes) == 1


def test_folder_that_cannot_be_synced_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = os.fsync

    def refuse(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(22, "Invalid argument")
        exact(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    disk.write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_table_that_could_not_grow_has_the_rows_it_had_and_grows_later(tmp_path: Path) -> None:
    table = GrowingTable(tmp_path / "table.csv")
    table.add([{"a": 1}])
    with full_disk(20), pytest.raises(OSError, match="File too large"):
        table.add([{"a": "x" * 100}])
    again = GrowingTable(table.path)
    again.resume(table.state())
    again.add([{"a": 2}])
    assert table.path.read_text().split() == ["a", "1", "2"]


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-4], lambda c: b"", lambda c: c.replace(b"1", b"7")]
)
def test_table_that_lost_rows_or_was_altered_is_not_continued(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    table = GrowingTable(tmp_path / "table.csv")
    table.add([{"a": 1}, {"a": 2}])
    state = table.state()
    table.add([{"a": 3}])
    table.path.write_bytes(damage(table.path.read_bytes()[: state["size"]]))
    with pytest.raises(ValueError, match="has lost rows or is damaged"):
        GrowingTable(table.path).resume(state)


def test_seal_shows_every_altered_byte_and_another_kind() -> None:
    content = disk.seal("kind/1", b"body")
    assert disk.unseal("kind/1", content) == b"body"
    with pytest.raises(ValueError, match="it is no kind/2 file"):
        disk.unseal("kind/2", content)
    for place in range(len(content)):
        altered = bytearray(content)
        altered[place] ^= 1
        with pytest.raises(ValueError, match=r"it is (no|damaged)"):
            disk.unseal("kind/1", bytes(altered))


def test_stage_file_that_is_altered_or_of_another_stage_is_made_anew(tmp_path: Path) -> None:
    journal = RunJournal(tmp_path, Console(quiet=True), resume=True)
    for part, value in (("blocks.0", 0.0), ("blocks.1", 1.0)):
        journal.finish(part, {"weight": torch.full((4,), value)})
    first, second = (tmp_path / "stages" / f"blocks.{number}.ckpt" for number in (0, 1))
    found = journal.finished("blocks.0")
    assert found is not None and torch.equal(found["weight"], torch.zeros(4))
    whole = first.read_bytes()
    for place in range(0, len(whole), 7):
        altered = bytearray(whole)
        altered[place] ^= 4
        first.write_bytes(altered)
        assert journal.finished("blocks.0") is None
    first.write_bytes(second.read_bytes())
    assert journal.finished("blocks.0") is None and journal.finished("blocks.1") is not None


def test_losses_of_parts_that_have_others_stand_below_their_own_names(tmp_path: Path) -> None:
    journal = RunJournal(tmp_path, Console(quiet=True))
    for part, losses in (("head", {"block": 1.0, "loss": 2.0}), ("joint", {"logits": 3.0})):
        journal.begin(part, 1, 0)
        journal.step(part, 0, losses)
        journal.finish(part, {})
    first, second = read_table(tmp_path / "reconstruction.csv")
    assert first["block"] == 1.0 and first["logits"] is None
    assert second["logits"] == 3.0 and second["block"] is None and second["loss"] is None

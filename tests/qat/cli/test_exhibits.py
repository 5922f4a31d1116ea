"""What W&B and TensorBoard get of a run beside numbers, and that a resumed run is one run there."""

from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qat.cli.exhibits import exhibit
from tests import runs

ITEMS = {"top1": 0.5, "coverage": [{"precision": "w4a4", "macs": 0.9}, {"precision": "float"}]}
CELLS = [["w4a4", 0.9], ["float", None]]


class Run:
    """A run of W&B that only remembers."""

    def __init__(self) -> None:
        self.id = "abc"
        self.config = self
        self.logged: dict[str, Any] = {}
        self.models: dict[str, str] = {}

    def log(self, items: dict[str, Any]) -> None:
        self.logged |= items

    def log_model(self, path: str, name: str) -> None:
        self.models[name] = path

    def update(self, *words: Any, **named: Any) -> None: ...

    def finish(self) -> None: ...


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with a picture and a model."""
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "stream.png")
    (tmp_path / "model.ckpt").write_bytes(b"model")
    return tmp_path


@pytest.mark.parametrize("keep", [False, True])
def test_wandb_gets_tables_pictures_and_the_model_where_asked(folder: Path, keep: bool) -> None:
    run: Any = Run()
    exhibit(WandbLogger(experiment=run, log_model=keep), folder, ITEMS)
    table = run.logged["coverage"]
    assert (table.columns, table.data) == (["precision", "macs"], CELLS)
    (picture,) = run.logged["stream"]
    assert (picture.image or Image.open(folder / "stream.png")).size == (6, 4)
    assert run.models == ({"model-abc": str(folder / "model.ckpt")} if keep else {})


def test_tensorboard_gets_tables_and_pictures(folder: Path) -> None:
    logger = TensorBoardLogger(str(folder), name="", version="")
    exhibit(logger, folder, ITEMS)
    logger.finalize("success")
    events = EventAccumulator(str(folder)).Reload()
    (text,) = events.Tensors("coverage/text_summary")
    assert b"| w4a4 | 0.9 |" in text.tensor_proto.string_val[0]
    (picture,) = events.Images("stream")
    assert (picture.width, picture.height) == (6, 4)


def test_tracker_of_numbers_alone_is_left_in_peace(folder: Path) -> None:
    exhibit(CSVLogger(str(folder)), folder, ITEMS)


def test_resumed_fit_continues_its_wandb_run_and_logs_the_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, run = [], Run()

    def init(**settings: Any) -> Run:
        begun.append(settings)
        return run

    monkeypatch.setattr(wandb, "init", init)
    recipe = runs.write_recipe(tmp_path / "recipe.yaml")
    words = ("--config", recipe, "--run_dir", tmp_path / "run", "--trainer.logger", "WandbLogger")
    words += ("--trainer.limit_train_batches", 2, "--trainer.log_every_n_steps", 1)
    assert runs.run("fit", *words, "--trainer.max_epochs", 1) == 0
    assert run.logged["train/lr"] > 0
    assert {row[0] for row in run.logged["coverage"].data} == {"float"}
    (tmp_path / "run" / "metrics.json").unlink()  # as where it was interrupted before its end
    assert runs.run("fit", *words, "--trainer.max_epochs", 2, "--ckpt_path", "last") == 0
    first, second = begun
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"


def test_adapt_shows_its_table_and_picture(teacher: Path, tmp_path: Path) -> None:
    logger = {"class_path": "pytorch_lightning.loggers.TensorBoardLogger"}
    base = runs.ROOT / "configs/digits_teacher.yaml"
    recipe = {
        "base": str(base),
        "model": {"model": None, "teacher": str(teacher)},
        "stream": {"style": "cifar", "num_images": 4, "batch_size": 4},
        "trainer": {"logger": {**logger, "init_args": {"save_dir": "."}}},
    }
    corruptions = {"corruptions": ["contrast"]}
    protocol = {"class_path": "qat.data.protocols.Continual", "init_args": corruptions}
    recipe["stream"] |= {"protocol": protocol}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert runs.run("adapt", "--config", path, "--run_dir", tmp_path / "run") == 0
    (log,) = (tmp_path / "run").rglob("events.*")
    events = EventAccumulator(str(log.parent)).Reload()
    assert events.Tags()["images"] == ["stream"]
    assert {"coverage/text_summary", "table/text_summary"} <= set(events.Tags()["tensors"])

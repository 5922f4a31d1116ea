"""Runs of the command line on real images, for tests: what starts one, and what it leaves."""

import contextlib
import json
from pathlib import Path
from typing import Any

import yaml

from qat.checkpoint import digest, read
from qat.cli.main import main

ROOT = Path(__file__).parents[1]
QUIET = ("--num_threads", "1", "--trainer.enable_progress_bar", "false")
SHORT = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "4")
TINY = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def run(command: str, *words: object) -> int:
    """Exit status of a command, run in the root of the repository, on one thread."""
    quiet = QUIET if command in ("fit", "test") else ()
    with contextlib.chdir(ROOT):
        return main([command, *map(str, words), *quiet])


def fit(config: str | Path, folder: Path, *words: object) -> dict[str, Any]:
    """What a `fit` that succeeds writes into `metrics.json`."""
    assert run("fit", "--config", config, "--run_dir", folder, *words) == 0
    return metrics(folder)


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def write_recipe(path: Path, base: str = "configs/digits_teacher.yaml", **changes: Any) -> Path:
    """A recipe beside which nothing is, built on one of ours."""
    path.write_text(yaml.safe_dump({"base": str(ROOT / base), **changes}))
    return path


def weights(folder: Path) -> str:
    """Hash of everything that the run trained."""
    return digest(read(folder / "checkpoints" / "last.ckpt")["state_dict"])


def student(name: str, teacher: Path) -> Path:
    """Run folder of a student after four steps; trained once in a session."""
    folder = teacher.parents[2] / f"student-{name}"
    config = {"lsq": "configs/qat/digits_w4a4_lsq.yaml", "binary": "configs/default.yaml"}[name]
    if not (folder / "metrics.json").exists():
        fit(config, folder, "--model.teacher", teacher, *SHORT)
    return folder

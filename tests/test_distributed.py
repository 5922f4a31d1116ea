"""Two processes train one model and evaluate every image once, whoever started them."""

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.distributed import TCPStore

import qat
from qat.checkpoint import digest, read
from qat.cli.main import main, make_parser
from tests import runs

SCRIPT = '''
"""`train.py` that also leaves what each process ends with."""
import os
import sys

import torch
from pytorch_lightning import Callback, Trainer

from qat.cli.main import main


class Witness(Callback):
    """Writes the model, and the images that the process trained on, when training ends."""

    def __init__(self):
        self.images = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.images.append(batch[0])

    def on_train_end(self, trainer, pl_module):
        state = {k: v for k, v in pl_module.model.state_dict().items() if torch.is_tensor(v)}
        path = os.path.join(os.environ["WITNESS"], f"{trainer.global_rank}.pt")
        torch.save({"state": state, "images": torch.cat(self.images)}, path)


setup = Trainer.__init__


def init(self, *args, **kwargs):
    setup(self, *args, **kwargs)
    self.callbacks.append(Witness())


if __name__ == "__main__":
    Trainer.__init__ = init
    sys.exit(main())
'''


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_two_processes_end_with_one_model_and_evaluate_every_image_once(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    recipe = runs.write_recipe(
        tmp_path / "recipe.yaml",
        model={
            "model": {"init_args": {"model_args": runs.TINY}},
            "plan": "configs/plans/vit_w4a4.yaml",
        },
        data={"augment": None, "batch_size": 64},
        trainer={"max_epochs": 1, "accelerator": "cpu", "devices": 2, "strategy": "ddp"},
    )
    words: list[object] = ["fit", "--config", recipe, "--run_dir", tmp_path / "run", *runs.QUIET]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(runs.ROOT),
        "MASTER_PORT": str(_free_port()),
        "WITNESS": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, tmp_path / "script.py", *map(str, words)],
        cwd=runs.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert digest(first["state"]) == digest(second["state"])
    saved = read(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    scale = "blocks.0.attn.qkv.weight_quantizer.scale"
    assert torch.equal(saved[f"model.{scale}"], first["state"][scale])
    # 1437 images: 718 a process, of which eleven whole batches.
    sets = [{tuple(i.flatten().tolist()) for i in seen["images"]} for seen in (first, second)]
    assert [len(seen["images"]) for seen in (first, second)] == [704, 704]
    assert not sets[0] & sets[1]
    found = runs.metrics(tmp_path / "run")
    assert found["n_images"] == 360
    # The same weights, judged by one process.
    one = ("--trainer.devices", 1, "--trainer.strategy", "auto")
    words = ["--config", recipe, "--run_dir", tmp_path / "test", *one]
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert runs.run("test", *words, "--ckpt_path", checkpoint) == 0
    alone = runs.metrics(tmp_path / "test")
    assert found["top1"] == alone["top1"]
    assert found["top5"] == alone["top5"]
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def _process(environment: dict[str, str], folder: Path, words: tuple[object, ...]) -> None:
    """The command line in a process that something started as one of several."""
    os.environ.update(environment)
    with (
        contextlib.chdir(folder),
        open(f"{environment['NAME']}.log", "w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        status = main([*map(str, words)])
    os._exit(status)  # the copy of the process that runs the tests has more to do at its end


def _run_as(environments: list[dict[str, str]], folder: Path, *words: object) -> list[int]:
    """Exit statuses of copies of this process, each under further environment variables."""
    make_parser("fit"), make_parser("test")  # what they import is then there in every copy
    context = multiprocessing.get_context("fork")
    started = []
    for rank, environment in enumerate(environments):
        named = {**environment, "NAME": str(rank)}
        started.append(context.Process(target=_process, args=(named, folder, words)))
        started[-1].start()
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]


def _torchrun(port: int) -> list[dict[str, str]]:
    common = {
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


def _slurm(port: int) -> list[dict[str, str]]:
    common = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "MASTER_PORT": str(port)}
    return [{**common, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ("0", "1")]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A recipe of three steps."""
    return runs.write_recipe(
        tmp_path / "recipe.yaml",
        model={"model": {"init_args": {"model_args": runs.TINY}}},
        trainer={"max_epochs": 1, "limit_train_batches": 3, "enable_progress_bar": False},
    )


def test_processes_of_torchrun_train_together_in_one_folder_that_the_first_one_names(
    tiny: Path, tmp_path: Path
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert _run_as(_torchrun(store.port), tmp_path, "fit", "--config", tiny) == [0, 0]
    (folder,) = (tmp_path / "runs").iterdir()
    found = runs.metrics(folder)
    assert found["n_images"] == 360 and found["epochs"] == 1
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "checkpoints"}
    assert (tmp_path / "0.log").read_text().count("run folder") == 1


def test_tasks_of_slurm_train_together(tiny: Path, tmp_path: Path) -> None:
    words = ("fit", "--config", tiny, "--run_dir", "run", "--trainer.devices", 2)
    assert _run_as(_slurm(_free_port()), tmp_path, *words) == [0, 0]
    assert runs.metrics(tmp_path / "run")["n_images"] == 360


def test_tasks_of_slurm_without_a_folder_are_told_to_name_one(tiny: Path, tmp_path: Path) -> None:
    words = ("fit", "--config", tiny, "--trainer.devices", 2)
    assert _run_as(_slurm(_free_port()), tmp_path, *words) == [1, 1]
    for rank in (0, 1):
        (line,) = (tmp_path / f"{rank}.log").read_text().splitlines()
        assert "SLURM_NTASKS" in line and "--run_dir" in line


def test_command_in_one_process_leaves_the_others_nothing_to_do(tiny: Path, tmp_path: Path) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = ("test", "--config", tiny, "--run_dir", "run")
    assert _run_as(_torchrun(store.port), tmp_path, *words) == [0, 0]
    assert runs.metrics(tmp_path / "run")["n_images"] == 360
    said = "test runs in one process and leaves aside the other 1 that torchrun started"
    assert said in (tmp_path / "0.log").read_text()


@pytest.mark.parametrize("command", ["test", "quantize", "search", "adapt"])
def test_recipe_of_two_devices_runs_in_one_process_under_other_commands(
    command: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more: dict[str, tuple[object, ...]] = {
        "test": (),
        "quantize": ("--model.plan", "w8a8", "--model.quantizer", "qat.quantizers.Affine"),
        "adapt": ("--stream.style", "cifar", "--stream.num_images", 5),
    }
    more["search"] = (*more["quantize"], "--data.num_calibration", 4, "--search.weights", "[4,8]")
    ddp = ("--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", "ddp")
    words = ("--config", "configs/digits_teacher.yaml", "--ckpt_path", teacher)
    run_dir = ("--run_dir", tmp_path / "run")
    assert runs.run(command, *words, *run_dir, *ddp, *more[command]) == 0
    assert runs.metrics(tmp_path / "run")["command"] == command
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{command} runs in one process and leaves aside trainer.devices 2" in shown


@pytest.mark.slow
def test_torchrun_itself_trains_a_student_and_its_teacher(tiny: Path, tmp_path: Path) -> None:
    recipe = runs.write_recipe(
        tmp_path / "student.yaml",
        "configs/qat/digits_w4a4_lsq.yaml",
        teacher_config=str(tiny),
        trainer={"max_epochs": 1, "limit_train_batches": 3, "enable_progress_bar": False},
    )
    command = ["torchrun", "--nproc-per-node", "2", str(runs.ROOT / "train.py"), "fit"]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command[1:], "--config", str(recipe)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(runs.ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()
    for place in (folder, folder / "teacher"):
        assert runs.metrics(place)["n_images"] == 360


@pytest.mark.slow
def test_recipe_of_imagenet_trains_in_two_processes_on_a_few_photos_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of docs/guides/imagenet.md, on images and a model that are smaller."""
    for part, count in (("train", 8), ("val", 3)):
        for number, name in enumerate(("cat", "dog", "owl")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                photo = Image.new("RGB", (40, 40), (70 * number, 9 * i, 90))
                photo.save(tmp_path / part / name / f"{i}.png")
    monkeypatch.setenv("IMAGENET", str(tmp_path))
    size: dict[str, Any] = {"num_classes": 3, "img_size": 32, "model_args": runs.TINY}
    qat.save(qat.timm_model("deit_small_patch16_224", **size), tmp_path / "teacher.ckpt")
    words: list[object] = ["fit", "--config", "binaryvit/deit_small_imagenet", "--run_dir", "run"]
    words += ["--model.teacher", "teacher.ckpt"]
    words += ["--model.objective.hard", 0, "--model.objective.soft", 1]
    words += ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"]
    words += ["--trainer.accumulate_grad_batches", 2, "--data.batch_size", 2]
    words += ["--data.num_workers", 0, "--trainer.enable_progress_bar", "false"]
    for key, value in size.items():
        words += [f"--model.model.init_args.{key}", json.dumps(value)]
    for epochs, more in ((1, ()), (2, ("--ckpt_path", "last"))):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        length = ("--trainer.max_epochs", epochs)
        done = _run_as(_torchrun(store.port), tmp_path, *words, *length, *more)
        assert done == [0, 0], (tmp_path / "0.log").read_text()[-2000:]
        found = runs.metrics(tmp_path / "run")
        assert found["epochs"] == epochs and found["n_images"] == 9
        last = read(tmp_path / "run" / "checkpoints" / "last.ckpt")
        assert last["global_step"] == 3 * epochs  # 24 images: 2 processes, 2 batches of 2 a step
    assert "flip_rate" in found and "top1_teacher" in found

"""Two processes train one model, and evaluate every image once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qat.checkpoint import digest, read
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

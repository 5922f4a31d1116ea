"""The commands of README and quickstart, as printed, in their order, on photos made here."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from tests import runs

PROGRAMS = {
    "lowbit-vit": [sys.executable, "-m", "qat.cli"],
    "python train.py": [sys.executable, str(runs.ROOT / "train.py")],
}
"""Beginnings of the commands that are run; others install, or are run by themselves."""


def commands(page: str) -> list[str]:
    """The commands of a page: lines set as code, without what explains them."""
    lines = re.findall(r"^ {4}(\S.*)$", (runs.ROOT / page).read_text(), re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in lines if line.startswith(tuple(PROGRAMS))]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos/` in three classes and `weights.safetensors` of a small ViT."""
    home = tmp_path_factory.mktemp("walk")
    random = np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog", "owl")):
        (home / "photos" / name).mkdir(parents=True)
        for i in range(34):
            pixels = random.integers(0, 120, (48, 64, 3)) + 60 * number
            photo = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            photo.save(home / "photos" / name / f"{i:02}.jpg")
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), home / "weights.safetensors")
    return home


def test_pages_have_commands_to_walk() -> None:
    """So that a page whose commands are no longer found does not pass in silence."""
    assert len(commands("README.md")) == 2
    verbs = {shlex.split(command)[1] for command in commands("docs/quickstart.md")}
    assert verbs == {"fit", "test", "quantize", "search", "adapt", "predict", "export"}


@pytest.mark.walk
@pytest.mark.parametrize("command", [*commands("docs/quickstart.md"), *commands("README.md")])
def test_command_does_what_the_page_says(command: str, home: Path) -> None:
    start = next(name for name in PROGRAMS if command.startswith(name))
    words = [*PROGRAMS[start], *shlex.split(command.removeprefix(start))]
    done = subprocess.run(words, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in re.findall(r"--run_dir (\S+)", command):
        assert (home / folder / "metrics.json").exists()

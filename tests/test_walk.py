"""Commands of README, quickstart and guides, as printed, in their order, on photos made here."""

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


GUIDES = tuple(
    f"docs/guides/{path.name}" for path in sorted((runs.ROOT / "docs/guides").glob("*.md"))
)
PAGES = ("README.md", "docs/quickstart.md", *GUIDES)
"""In this order the guides find the model of digits that the README's command has trained."""
FENCED = re.compile(r"^```(?:python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# (\S+\.(?:py|yaml))\n")
"""The first line of what is to be saved as a file; what has none is run."""


def commands(page: str) -> list[str]:
    """The commands of a page: lines set as code, without what explains them."""
    lines = re.findall(r"^ {4}(\S.*)$", (runs.ROOT / page).read_text(), re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in lines if line.startswith(tuple(PROGRAMS))]


def steps(page: str) -> list[str]:
    """What a reader of a page does, in order: its commands, and files and Python of a guide.

    The Python of README and quickstart is run by `tests/test_readme.py`.
    """
    if page not in GUIDES:
        return commands(page)
    text = FENCED.sub(lambda block: f"\0{block[1]}\0", (runs.ROOT / page).read_text())
    parts = enumerate(text.split("\0"))
    found = [
        [part] if i % 2 else re.findall(r"^ {4}(\S.*)$", part, re.MULTILINE) for i, part in parts
    ]
    return [step for part in found for step in part]


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
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(s, id=f"{Path(page).stem}-{i}")
        for page in PAGES
        for i, s in enumerate(steps(page))
    ],
)
def test_step_does_what_the_page_says(step: str, home: Path) -> None:
    if name := NAMED.match(step):
        (home / name[1]).write_text(step)
        return
    start = next((name for name in PROGRAMS if step.startswith(name)), None)
    words = [sys.executable, "-c", step]
    if start is not None:
        words = [*PROGRAMS[start], *shlex.split(step.removeprefix(start))]
    done = subprocess.run(words, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in re.findall(r"--run_dir (\S+)", step if start else ""):
        assert (home / folder / "metrics.json").exists()

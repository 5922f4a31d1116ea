"""Commands of README, quickstart and guides, as printed, in their order, on photos made here."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from qat.cli.main import main
from tests import runs

PROGRAMS = ("lowbit-vit", "python train.py")
"""Two names of one program; lines that begin otherwise install, or are run by themselves."""
GUIDES = tuple(f"docs/guides/{p.name}" for p in sorted((runs.ROOT / "docs/guides").glob("*.md")))
PAGES = ("README.md", "docs/quickstart.md", *GUIDES)
"""In this order the guides find the model of digits that the README's command has trained."""
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# (\S+\.(?:py|yaml))\n")
"""The first line of what is to be saved as a file; other Python is run."""


def commands(text: str) -> list[str]:
    """The commands of a text: lines set as code, without what explains them."""
    lines = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in lines if line.startswith(PROGRAMS)]


def steps(page: str) -> list[str]:
    """What a reader of a page does, in order: its commands, and the files and Python of a guide.

    The Python of README and quickstart is run by `tests/test_readme.py`; what is fenced as `sh`
    takes a cluster.
    """
    text, *fenced = FENCED.split((runs.ROOT / page).read_text())
    found = commands(text)
    for kind, body, after in zip(fenced[::3], fenced[1::3], fenced[2::3], strict=True):
        taken = page in GUIDES and kind in ("python", "yaml")
        found += [*([body] if taken else []), *commands(after)]
    return found


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
    assert len(steps("README.md")) == 2
    verbs = {shlex.split(command)[1] for command in steps("docs/quickstart.md")}
    assert verbs == {"fit", "test", "quantize", "search", "adapt", "predict", "export", "report"}
    assert [page for page in GUIDES if not steps(page)] == ["docs/guides/index.md"]


@pytest.mark.walk
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(s, id=f"{Path(page).stem}-{i}")
        for page in PAGES
        for i, s in enumerate(steps(page))
    ],
)
def test_step_does_what_the_page_says(
    step: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("warnings.filters", [("ignore", None, Warning, None, 0)])
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(home)
    if name := NAMED.match(step):
        (home / name[1]).write_text(step)
    elif not step.startswith(PROGRAMS):
        exec(step, {})
    else:
        start = next(name for name in PROGRAMS if step.startswith(name))
        assert main(shlex.split(step.removeprefix(start))) == 0
        for folder in re.findall(r"--run_dir (\S+)", step):
            assert (home / folder / "metrics.json").exists()

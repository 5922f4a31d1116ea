"""The documentation: every page is found, every link leads somewhere, every method has a page."""

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ptq_init
from qat import quantizers, tta
from tests import runs

DOCS = runs.ROOT / "docs"
BROUGHT = {"index.md", "changes.md", "contributing.md", "security.md", "commands.md"}
"""Pages that `docs/hooks.py` brings from elsewhere or makes."""
GUIDES = sorted((DOCS / "guides").glob("*.md"))
METHODS = sorted((DOCS / "methods").glob("*.md"))


def _named(nav: Any) -> Iterator[str]:
    """The pages that a part of the navigation names, patterns spelled out."""
    if isinstance(nav, str):
        yield from (str(p.relative_to(DOCS)) for p in DOCS.glob(nav)) if "*" in nav else (nav,)
    else:
        for inner in nav.values() if isinstance(nav, dict) else nav:
            yield from _named(inner)


def test_navigation_names_every_page_once() -> None:
    config = yaml.safe_load((runs.ROOT / "mkdocs.yml").read_text())
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert sorted(_named(config["nav"])) == sorted(pages | BROUGHT)


def test_relative_links_lead_somewhere() -> None:
    for page in (*runs.ROOT.glob("*.md"), *DOCS.rglob("*.md")):
        for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_guides_are_short() -> None:
    for page in GUIDES:
        assert len(page.read_text().split()) <= 500, page.name


def test_every_quantizer_initialiser_and_method_of_adaptation_has_a_page() -> None:
    pages = "\n".join(path.read_text() for path in METHODS)
    named = [
        name
        for package, kind in ((quantizers, quantizers.Quantizer), (tta, tta.Method))
        for name in package.__all__
        if inspect.isclass(found := getattr(package, name))
        and issubclass(found, kind)
        and not inspect.isabstract(found)
    ]
    files = [path.stem for path in Path(str(ptq_init.__file__)).parent.glob("[!_]*.py")]
    assert len(named) > 15 and len(files) > 5
    for name in (*named, *(f"ptq_init.{file}" for file in files)):
        assert re.search(rf"\b{re.escape(name)}\b", pages), name


PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = [path for path in (DOCS / "api.md", *METHODS) if "```python" in path.read_text()]


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.stem)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for program in PYTHON.findall(page.read_text()):
        exec(program, names)


MODULES = [
    ".".join(path.relative_to(runs.ROOT).with_suffix("").parts)
    for package in ("qat", "binaryvit", "ptq_init")
    for path in (runs.ROOT / package).rglob("*.py")
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_give_what_they_say(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


@pytest.mark.slow
def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    commands = (tmp_path / "commands.html").read_text()
    assert all(flag in commands for flag in ("--run_dir", "--stream.protocol", "--search.metric"))

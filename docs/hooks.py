"""What the site has beside the pages of this folder; mkdocs calls the functions named `on_...`."""

import posixpath
import re
from argparse import SUPPRESS, Action
from collections import defaultdict
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from qat.cli.main import COMMANDS, make_parser

ROOT = Path(__file__).parents[1]
BROUGHT = {
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "SECURITY.md": "security.md",
}
"""Pages that lie outside of this folder, and where they stand in the site."""
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
OPENING = """# Commands

`lowbit-vit COMMAND --config RECIPE --flag value ...`; `python train.py` is the same program.

::: qat.cli.shorthand
    options: {members: []}

| command | does |
|---|---|
"""
SECTIONS = {
    "run": "Flags of a run.",
    "model": "What is trained or quantized, and how.",
    "data": "Images, and how they are read.",
    "search": "What `search` chooses, and under which budget.",
    "stream": "The stream that `adapt` answers.",
    "trainer": "Lightning's `Trainer`; its documentation says more.",
}


def on_config(config: Any) -> Any:
    """Spell out entries of the navigation such as `decisions/*.md`."""
    config.nav = [_spelled_out(entry) for entry in config.nav]
    return config


def _spelled_out(entry: Any) -> Any:
    """An entry with each pattern in it replaced by the pages it stands for."""
    if isinstance(entry, list):
        return [_spelled_out(inner) for inner in entry]
    if isinstance(entry, dict):
        return {title: _spelled_out(inner) for title, inner in entry.items()}
    docs = ROOT / "docs"
    found = sorted(str(path.relative_to(docs)) for path in docs.glob(entry)) if "*" in entry else []
    return found or entry


def on_files(files: Files, config: Any) -> Files:
    """Add the reference of commands, pages from outside, and other files that pages link to."""
    examples = (str(path.relative_to(ROOT)) for path in ROOT.glob("examples/*.py"))
    for name in (*BROUGHT, "CITATION.cff", *examples):
        files.append(File.generated(config, _place(name), abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def _place(name: str) -> str:
    """Where a file of the repository stands in the site."""
    return BROUGHT.get(name, name).removeprefix("docs/")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to files of the repository to where these stand in the site."""
    places = {place: name for name, place in BROUGHT.items()}
    here = posixpath.dirname(places.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    there = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        name = posixpath.normpath(posixpath.join(here, link[1]))
        place = _place(f"{name}/README.md" if (ROOT / name).is_dir() else name)
        return posixpath.relpath(place, there or ".")

    return LINK.sub(moved, markdown)


def commands() -> str:
    """The page of all commands and flags, from the parsers themselves."""
    lines = [f"| `{name}` | {text} |" for name, text in COMMANDS.items()]
    tables: dict[str, dict[tuple[str, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in COMMANDS:
        for action in make_parser(name)._actions:
            if action.default != SUPPRESS:
                tables[_section(action)][_row(action)].append(name)
    for section, about in SECTIONS.items():
        lines += ["", f"## {section}", "", about, ""]
        lines += ["| flag | does | unless set | commands |", "|---|---|---|---|"]
        for cells, names in tables[section].items():
            lines.append(f"| {' | '.join((*cells, _all_of(names)))} |")
    return OPENING + "\n".join(lines)


def _all_of(names: list[str]) -> str:
    """Commands that have a flag; where most do, those that do not."""
    others = [name for name in COMMANDS if name not in names]
    if len(others) > 2:
        return ", ".join(names)
    return f"all but {', '.join(others)}" if others else "all"


def _section(action: Action) -> str:
    section, dot, _ = action.dest.partition(".")
    return section if dot else "run"


def _row(action: Action) -> tuple[str, ...]:
    """Flag, what it does, and its default; of Lightning's long texts the first sentence."""
    text = " ".join((action.help or "").split()).replace("|", "or")
    if _section(action) == "trainer":
        text = re.split(r"(?<=\.) ", text.replace("``", "`"))[0]
    default = action.default
    default = getattr(default, "class_path", getattr(default, "__name__", default))
    flag = action.option_strings[0] if action.option_strings else action.dest.upper()
    return f"`{flag}`", text, "" if default is None else f"`{default}`"

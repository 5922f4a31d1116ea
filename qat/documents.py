"""YAML of people: read as plain data, and refused where it says two things at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: Path, kind: str) -> Any:
    """The plain data in a YAML file.

    Args:
        path: The file.
        kind: What it is, for messages.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no YAML, or a mapping has a key twice, of which YAML keeps the last.
    """
    try:
        text = path.read_text()
        require_unique_keys(text)
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{kind} '{path}' is no YAML: {error}") from None
    except ValueError as error:
        raise ValueError(f"{kind} '{path}': {error}") from None


def require_unique_keys(text: str) -> None:
    """Refuse YAML in which a mapping has a key twice.

    Raises:
        ValueError: If there is one.
        YAMLError: If it is no YAML.
    """
    for mapping in _mappings(yaml.compose(text, yaml.SafeLoader), set()):
        _require_unique_keys(mapping)


def _mappings(node: Any, seen: set[int]) -> Iterator[yaml.MappingNode]:
    """Every mapping below a node, once; aliases may make a document circular."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield node
    for part in node.value:
        for inner in part if isinstance(part, tuple) else (part,):
            yield from _mappings(inner, seen)


def _require_unique_keys(mapping: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in mapping.value:
        line, name = key.start_mark.line + 1, (key.tag, str(key.value))
        if name in lines:
            raise ValueError(
                f"key '{key.value}' stands on line {lines[name]} and again on line {line}, where "
                "it would hide what came before; merge the two"
            )
        lines[name] = line

"""What a page is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Card:
    """A number with its name, and what it is to be compared with."""

    label: str
    value: str
    beside: str = ""


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite specification, with what it shows in words."""

    spec: dict[str, Any]
    alt: str
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text; the columns after the first `num_words` hold numbers, or all words for None."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_words: int | None = 1


@dataclass(frozen=True)
class Picture:
    """An image of small pixels, as a URI, with its caption."""

    uri: str
    caption: str


@dataclass(frozen=True)
class Note:
    """A line that a reader must not miss."""

    text: str


Part = Chart | Table | Picture | Note


@dataclass(frozen=True)
class Section:
    """A part of the page about one thing.

    Attributes:
        title: Its heading.
        words: What one sees, and what is good.
        parts: What it shows.
    """

    title: str
    words: str
    parts: Sequence[Part]

"""Numbers as people read them."""

from math import floor, log10
from typing import Any

from qat.cli.charts.theme import Number

UNITS = ("", " k", " M", " G", " T", " P")


def count(value: Number) -> str:
    """A number of things: `360`, `8.95 M`."""
    return f"{value:,.0f}" if value < 10_000 else _scaled(value)


def size(num_bytes: Number) -> str:
    """Bytes: `156 kB`, `12.3 MB`."""
    return f"{num_bytes:,.0f} B" if num_bytes < 1000 else f"{_scaled(num_bytes)}B"


def share(value: Number) -> str:
    """A fraction from 0 to 1: `0.972`."""
    return f"{value:.3f}"


def percent(value: Number) -> str:
    """A fraction as a percentage: `99.6 %`; 0 and 100 % are said of none and of all only."""
    if 0 < value < 0.001:
        return "< 0.1 %"
    return f"{100 * value:.0f} %" if value in (0, 1) else f"{floor(value * 1000) / 10:.1f} %"


def times(ratio: Number) -> str:
    """A ratio: `8.7×`."""
    return f"{ratio:,.0f}×" if ratio >= 20 else f"{ratio:.1f}×"


def duration(seconds: Number) -> str:
    """A time: `2.1 ms`, `41.2 s`, `3 min 4 s`, `25 min`, `2.1 h`."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def plain(value: Any) -> str:
    """Any value of a table."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def _scaled(value: Number) -> str:
    """Three digits and a prefix of the thousands."""
    power = min(len(UNITS) - 1, int(log10(value) // 3))
    if round(value / 1000**power, 1) >= 1000:
        power += 1
    return f"{value / 1000**power:.3g}{UNITS[power] or ' '}"

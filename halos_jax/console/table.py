"""Tables of text that are no wider than a terminal: columns that find no room are named."""

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from halos_jax.console.values import WIDTH

NONE = "-"  # in a cell without a value
_LEAST = 40  # characters of a line of names
_LONGEST = 14  # characters of a column's name


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: its name, the text of each row ("" without a value), and how dispensable it is.

    Of columns that find no room, the one with the largest `rank` goes first; one of rank 0 stays.
    The names of the others are told below the table, wrapped.
    """

    name: str
    cells: Sequence[str]
    rank: int = 0


def format_table(columns: Sequence[Column], *, width: int = WIDTH) -> str:
    """Return the lines of a table: names, rows, and the names of columns without room, if any.

    A column without any value is left out.
    """
    shown = [one for one in columns if any(one.cells)]
    dropped: list[Column] = []
    while _measure(shown) > width and any(one.rank for one in shown):
        last = max(shown, key=lambda one: one.rank)
        shown.remove(last)
        dropped.append(last)
    texts = [[one.name[:_LONGEST], *(cell or NONE for cell in one.cells)] for one in shown]
    widths = [max(map(len, text)) for text in texts]
    lines = [
        "  ".join(cell.rjust(size) for cell, size in zip(row, widths, strict=True))
        for row in zip(*texts, strict=True)
    ]
    if dropped:
        names = [one.name for one in columns if one in dropped]
        lines += textwrap.wrap(f"(no room for: {', '.join(names)})", max(width, _LEAST))
    return "\n".join(lines)


def show_estimate(values: Mapping[str, Any], name: str) -> str:
    """Return a mean and half of its 95 % interval with the digits that this leaves it, at most 3.

    >>> show_estimate({"x": 2.2034, "x/low": 1.535, "x/high": 2.871}, "x")
    '2.20 ±0.67'
    """
    if name not in values:
        return ""
    if f"{name}/low" not in values or f"{name}/high" not in values:
        return f"{values[name]:z.3f}"
    half = (values[f"{name}/high"] - values[f"{name}/low"]) / 2
    digits = 3
    if half > 0 and math.isfinite(half):
        digits = min(max(1 - math.floor(math.log10(half)), 0), 3)
    return f"{values[name]:z.{digits}f} ±{half:.{digits}f}"


def _measure(columns: Sequence[Column]) -> int:
    widths = [max(map(len, (one.name[:_LONGEST], *one.cells))) for one in columns]
    return sum(widths) + 2 * (len(widths) - 1)

"""What a chart is: lines of points with their intervals, and the words that say how to read it."""

import dataclasses
from typing import Literal

Style = Literal["line", "faint", "bar", "path"]


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart: points, and where they have one, their 95 % interval.

    `notes` are what a point is called, where that is not its x.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    notes: tuple[str, ...] = ()
    style: Style = "line"


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart: its lines, how to read it, horizontal levels and vertical marks with their names.

    `name` is the same for the same chart of all runs; a comparison shows the first line of each.
    """

    name: str
    title: str
    about: str
    x: str
    y: str
    lines: tuple[Line, ...]
    levels: tuple[tuple[float, str], ...] = ()
    marks: tuple[tuple[float, str], ...] = ()


def keep_known(charts: "list[Chart]") -> "list[Chart]":
    """Return the charts that have a point, with the lines that have one."""
    found = []
    for chart in charts:
        lines = tuple(line for line in chart.lines if line.x)
        if lines:
            found.append(dataclasses.replace(chart, lines=lines))
    return found

"""The study's results, read: accuracies of rounds, values of signs, and tables as text.

A table is a list of rows of text, the first of them the names of its columns; `show` formats it.
Accuracies are in per cent. An interval is a 95 % one, from the spread between questions.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from halos_jax.signs.intervals import Estimate, estimate_mean

RESULTS = Path(__file__).parent / "results"
NAME = re.compile(r"(?P<kind>[a-z]+)-(?P<shape>\w+)-(?P<rate>\de-\d)-s(?P<seed>\d)")
SHAPES = ("offline", "4x512", "16x128", "64x32")
Result = Mapping[str, Any]
Table = list[list[str]]


class Point(NamedTuple):
    """A round's right answers: the share right of each question, in the order of their ids."""

    round: int
    shares: np.ndarray

    @property
    def estimate(self) -> Estimate:
        """The mean share, with its interval."""
        return estimate_mean(self.shares.tolist())


def load_results(folder: Path = RESULTS) -> dict[str, Result]:
    """Return name -> record of every file in a folder."""
    return {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))
    }


def select(results: Mapping[str, Result], **wanted: str) -> dict[str, Result]:
    """Return the online runs whose `kind`, `shape`, `rate` and `seed` are as asked for."""
    found = {}
    for name, result in results.items():
        match = NAME.fullmatch(name)
        if match and all(match[key] == value for key, value in wanted.items()):
            found[name] = result
    return found


def read_curve(result: Result, name: str = "held_out") -> list[Point]:
    """Return the evaluated rounds of a run, on the held-out or on the `test` questions."""
    return [Point(one["round"], read_shares(one[name])) for one in result["rounds"] if name in one]


def read_shares(counts: Mapping[str, Any]) -> np.ndarray:
    """Return the share of right samples of each question, f64[questions]."""
    return np.array([int(one, 36) for one in counts["right"]]) / counts["samples"]


def has_ended(result: Result) -> bool:
    """Tell whether a run has evaluated the round that used the last of its prompts."""
    evaluated = [one["stop"] for one in result["rounds"] if "held_out" in one]
    total = result["config"].get("rounds", {}).get("total_prompts", math.inf)
    return bool(evaluated) and evaluated[-1] >= total


def find_best(curve: Sequence[Point]) -> Point:
    """Return the round with the highest accuracy, the first of equal ones."""
    return max(curve, key=lambda point: point.shares.mean())


def list_values(result: Result, sign: str) -> dict[int, float]:
    """Return round -> value of a sign of a run."""
    rounds = result["rounds"]
    return {one["round"]: one["metrics"][sign] for one in rounds if sign in one["metrics"]}


def percent(estimate: Estimate, sign: str = "") -> str:
    """Return "16.3 ± 2.5": a share in per cent, and half of its interval."""
    half = 100 * (estimate.high - estimate.low) / 2
    return f"{100 * estimate.value:{sign}.1f} ± {half:.1f}"


def show_signed(estimate: Estimate) -> str:
    """Return "-0.31 (-0.50 .. -0.12)"."""
    return f"{estimate.value:+.2f} ({estimate.low:+.2f} .. {estimate.high:+.2f})"


def show(table: Table) -> str:
    """Return a table as text, with its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

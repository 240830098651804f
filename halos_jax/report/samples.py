"""The samples that a page shows: held-out prompts from round to round, and what was trained on.

A page has room for some of them alone, so whole prompts are chosen, and what is left out is said.
A prompt is `{"id", "turns", "extra", "round", "cells"}`, with a cell for each column: a list of
`[text, reward, flags, tokens, scores, number]`, one a sample. Flags are letters of `FLAGS`.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from halos_jax.course.best import read_best
from halos_jax.report.recorded import Recorded, read_lines
from halos_jax.report.squeeze import take_within
from halos_jax.rounds.evaluation import EVAL
from halos_jax.types import FINISH_LENGTH
from halos_jax.workdir.manifests import Manifest, round_folder

FLAGS = {"c": "chosen", "r": "rejected", "t": "cut", "d": "desirable", "u": "undesirable"}

MOST_ROUNDS = 8  # columns of held-out samples
MOST_TRAINED = 6  # rounds whose training samples are shown
MOST_PROMPTS = 400  # of an evaluation, or of all training rounds together
LONGEST = 6000  # characters of a response, prompt or other text; longer ones are cut in the middle
_TAIL = 1500  # of them, those after the cut

Cell = list[list[Any]]


@dataclasses.dataclass(frozen=True)
class Browser:
    """Samples to look through: the headers of their columns, their prompts, what is left out."""

    columns: tuple[str, ...]
    prompts: tuple[Mapping[str, Any], ...]
    left_out: tuple[str, ...] = ()


class Column(NamedTuple):
    """A file of scored samples, and the header of its column."""

    label: str
    path: Path


# --------------------------------------------------------------------------- held-out samples


def list_held_out(run: Recorded) -> list[Column]:
    """Return a column for each evaluation of a run, oldest first."""
    if not run.rounds:
        path = run.workdir / EVAL
        return [Column("samples", path)] if path.is_file() else []
    return [
        Column(_name_round(run, one.round), _find(run, one, EVAL))
        for one in run.rounds
        if EVAL in one.files
    ]


def _name_round(run: Recorded, round: int) -> str:
    best = read_best(run.rounds[-1])
    is_best = best is not None and best.of > 1 and best.round == round
    start = "branch" if run.rounds[0].origin else "SFT"
    words = [*([start] if not round else []), *(["best"] if is_best else [])]
    return f"round {round}" + (f" ({', '.join(words)})" if words else "")


def choose_columns(run: Recorded) -> tuple[list[Column], list[str]]:
    """Return the evaluations that the page has room for, and what is said of the others."""
    columns = list_held_out(run)
    wanted = [index for index, one in enumerate(columns) if one.label.endswith("best)")]
    kept = spread(len(columns), MOST_ROUNDS, wanted)
    said = []
    if len(kept) < len(columns):
        said.append(f"held-out samples of {len(kept)} of {len(columns)} evaluations are shown")
    return [columns[index] for index in kept], said


def collect_held_out(columns: Sequence[Column], budget: int) -> Browser:
    """Return the same held-out prompts from column to column.

    If there is no room for all prompts, a third of those shown is the ones that have gained most
    from the first column to the last, a third those that have lost most, and a third random.

    Args:
      budget: characters of the page, as in `take_within`.
    """
    found = [_read_cells(column.path) for column in columns]
    first, last = (_average(found[index]) if found else {} for index in (0, -1))
    gains = {one: last[one] - first[one] for one in last if one in first}
    names = dict.fromkeys(name for cells in found for name in cells)
    ordered = _interleave(
        sorted(names, key=_draw),
        sorted(gains, key=lambda one: -gains[one]),
        sorted(gains, key=lambda one: gains[one]),
    )
    prompts = (
        _make_prompt(name, [cells.get(name) for cells in found]) for name in ordered[:MOST_PROMPTS]
    )
    taken, _ = take_within(prompts, budget)
    said = []
    if len(taken) < len(names):
        said.append(
            f"{len(taken)} of {len(names)} held-out prompts are shown: those that gained most, "
            "those that lost most, and random ones, a third each"
        )
    return Browser(tuple(column.label for column in columns), tuple(taken), tuple(said))


def correlate_length(path: Path) -> float | None:
    """Return the correlation of length and reward among the samples of a prompt, over all prompts.

    None if it is not known: a prompt has no two samples, or nothing varies.
    """
    lengths, rewards = list[float](), list[float]()
    for cells in _read_cells(path).values():
        rated = [(one[3], one[1]) for one in cells.samples if one[1] is not None]
        if len(rated) > 1:
            means = [statistics.fmean(column) for column in zip(*rated, strict=True)]
            lengths += [length - means[0] for length, _ in rated]
            rewards += [reward - means[1] for _, reward in rated]
    squares = [math.fsum(one * one for one in values) for values in (lengths, rewards)]
    if not lengths or min(squares) <= 0:
        return None
    products = math.fsum(one * other for one, other in zip(lengths, rewards, strict=True))
    return products / math.sqrt(squares[0] * squares[1])


# --------------------------------------------------------------------------- training samples


def collect_trained(run: Recorded, budget: int) -> Browser:
    """Return prompts of training rounds, with the samples that feedback was made of marked."""
    rounds = [one for one in run.rounds if {"samples.jsonl", "scores.jsonl"} <= one.files.keys()]
    kept = [rounds[index] for index in spread(len(rounds), MOST_TRAINED, ())]
    prompts, said, counts = list[Any](), list[str](), [0, 0]
    for one in kept:
        count, cells = _read_trained(run, one, MOST_PROMPTS // len(kept))
        made = (_make_prompt(name, [cells[name]], round=one.round) for name in cells)
        taken, _ = take_within(made, budget // len(kept))
        prompts += taken
        counts = [counts[0] + len(taken), counts[1] + count]
    if len(kept) < len(rounds):
        said.append(f"training samples of {len(kept)} of {len(rounds)} rounds are shown")
    if counts[0] < counts[1]:
        said.append(f"{counts[0]} of these rounds' {counts[1]} training prompts are shown, random")
    return Browser(("samples",), tuple(prompts), tuple(said))


def _read_trained(run: Recorded, one: Manifest, most: int) -> tuple[int, dict[str, "_Cells"]]:
    """Return how many prompts a round has, and the samples of some, random, with their marks."""
    paths = tuple(_find(run, one, name) for name in _TRAINED)
    return _parse_trained(paths, tuple(map(_identify, paths)), most)


_TRAINED = ("samples.jsonl", "scores.jsonl", "feedback.jsonl")


@functools.lru_cache(2 * MOST_TRAINED)
def _parse_trained(
    paths: tuple[Path, ...], identity: tuple[object, ...], most: int
) -> tuple[int, dict[str, "_Cells"]]:
    samples, scores, feedback = paths
    cells = _read_all(samples)
    chosen = {name: cells[name] for name in sorted(cells, key=_draw)[:most]}
    rewards = {
        (row.get("prompt_id"), row.get("sample_id")): row.get("reward")
        for row in read_lines(scores)
    }
    marks: dict[tuple[Any, Any], str] = {}
    for row in read_lines(feedback):
        for sample, flag in _read_marks(row):
            key = (row.get("prompt_id"), sample)
            marks[key] = marks.get(key, "").replace(flag, "") + flag
    for name, group in chosen.items():
        for sample in group.samples:
            key = (name, sample[5])
            sample[1] = rewards.get(key)
            sample[2] = marks.get(key, "") + sample[2]
    return len(cells), chosen


def _read_marks(row: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """Return (sample id, flag) of the samples in a record of feedback."""
    if row.get("type") == "pairwise_feedback":
        chosen, rejected = ("A", "B") if row.get("label") else ("B", "A")
        return [(row.get(f"sample_id_{chosen}"), "c"), (row.get(f"sample_id_{rejected}"), "r")]
    if row.get("type") == "binary_feedback":
        return [(row.get("sample_id"), "d" if row.get("label") else "u")]
    return []


# --------------------------------------------------------------------------- cells


class _Cells(NamedTuple):
    """The samples of a prompt in a file, and the first of its records."""

    record: Mapping[str, Any]
    samples: Cell


def _read_cells(path: Path) -> dict[str, _Cells]:
    """Return the samples of each prompt in a file of samples, in its order; not to be changed.

    A run's page is written after each round: files that it had before are not read again.
    """
    return _parse_cells(path, _identify(path))


@functools.lru_cache(MOST_ROUNDS + 1)
def _parse_cells(path: Path, identity: object) -> dict[str, _Cells]:
    return _read_all(path)


def _identify(path: Path) -> object:
    """Return what changes with a file: its inode, its size and the time of its last change."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read_all(path: Path) -> dict[str, _Cells]:
    found: dict[str, _Cells] = {}
    for row in read_lines(path):
        name = str(row.get("prompt_id"))
        cells = found.get(name) or found.setdefault(name, _Cells(_strip(row), []))
        flags = "t" if row.get("finish_reason") == FINISH_LENGTH else ""
        scores = {key: shorten_number(one) for key, one in (row.get("scores") or {}).items()}
        tokens = len(row.get("response_ids") or ())
        reward = shorten_number(row.get("reward"))
        text, number = cut_text(str(row.get("output", ""))), row.get("sample_id")
        cells.samples.append([text, reward, flags, tokens, scores, number])
    return found


def _strip(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a page shows of a record besides its sample."""
    return {"prompt": row.get("prompt"), "extra": row.get("extra") or {}}


def _make_prompt(name: str, cells: Sequence[_Cells | None], **more: Any) -> dict[str, Any]:
    record = next(one.record for one in cells if one is not None)
    extra = {
        str(key): cut_text(value if isinstance(value, str) else json.dumps(value))
        for key, value in record["extra"].items()
    }
    return {
        "id": name,
        "turns": [list(turn) for turn in _list_turns(record["prompt"])],
        "extra": extra,
        "cells": [None if one is None else one.samples for one in cells],
        **more,
    }


def _list_turns(prompt: Any) -> Iterable[tuple[str, str]]:
    for turn in prompt if isinstance(prompt, list) else [{"content": prompt}]:
        turn = turn if isinstance(turn, Mapping) else {"content": turn}
        content = turn.get("content", "")
        text = content if isinstance(content, str) else json.dumps(content)
        yield str(turn.get("role", "user")), cut_text(text)


def cut_text(text: str) -> str:
    """Return a text, or its beginning and its end with the number of characters between them."""
    if len(text) <= LONGEST:
        return text
    left = len(text) - LONGEST
    return f"{text[: LONGEST - _TAIL]}\n[... {left:,} characters left out ...]\n{text[-_TAIL:]}"


def shorten_number(value: Any) -> float | None:
    """Return a finite number with five significant digits; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


# --------------------------------------------------------------------------- what is chosen


def spread(count: int, most: int, wanted: Sequence[int]) -> list[int]:
    """Return at most so many of `count` indices: the first, the last, `wanted`, others evenly."""
    if count <= most:
        return list(range(count))
    chosen = dict.fromkeys([0, count - 1, *wanted])
    for step in range(most):
        chosen[round(step * (count - 1) / max(most - 1, 1))] = None
    return sorted(list(chosen)[:most])


def _average(cells: Mapping[str, _Cells]) -> dict[str, float]:
    rewards = {
        name: [one[1] for one in group.samples if one[1] is not None]
        for name, group in cells.items()
    }
    return {name: statistics.fmean(values) for name, values in rewards.items() if values}


def _draw(name: str) -> str:
    """Return what prompts are sorted by where any order would do, the same in every round."""
    return hashlib.sha256(name.encode()).hexdigest()


def _interleave(*lists: Sequence[str]) -> list[str]:
    ordered = dict.fromkeys(
        name for group in itertools.zip_longest(*lists) for name in group if name is not None
    )
    return list(ordered)


def _find(run: Recorded, one: Manifest, name: str) -> Path:
    return round_folder(run.workdir, one.round) / name

"""A page that compares runs: their curves on the same axes, their results, how they differ."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halos_jax.config import ConfigError, schema
from halos_jax.course.best import read_best
from halos_jax.report.charts import Chart, Line
from halos_jax.report.facts import Column, describe_state, list_columns
from halos_jax.report.page import HELD_OUT_SIZE, Contents, make_charts
from halos_jax.report.recorded import Recorded
from halos_jax.report.samples import Column as SampleColumn
from halos_jax.report.samples import collect_held_out, list_held_out
from halos_jax.workdir.changes import fill_loss

_NONE = "–"
_NOTE = "note"  # the column of what was decided at the end of a round
_MOST = 8  # runs on one page: as many as there are colours that can be told apart
_NO_DIFFERENCE = ("workdir", "mode", "progress", "report.")  # fields that make no other run


def compare_runs(runs: Sequence[Recorded]) -> Contents:
    """Return what a page of several runs shows.

    Raises:
      ConfigError: if there are more than a page has colours for, or one is there twice.
    """
    if len(runs) > _MOST:
        raise ConfigError(
            f"report.workdirs: got {len(runs)} runs with that of workdir, allowed: {_MOST} on a "
            "page; name fewer"
        )
    paths = [run.workdir.resolve() for run in runs]
    twice = [str(path) for path in dict.fromkeys(paths) if paths.count(path) > 1]
    if twice:
        raise ConfigError(
            f"report.workdirs: got {', '.join(twice)} twice, allowed: workdirs that differ from "
            "each other and from workdir, which is compared with them"
        )
    names = name_runs(runs)
    values = {
        "title": " · ".join(names),
        "state": f"{len(runs)} runs",
        "overview": sum_up(runs, names),
        "names": names,
        "differences": list_differences(runs),
        "remarks": [],
    }
    columns = _list_samples(runs, names)
    browsers = {"held_out": collect_held_out(columns, HELD_OUT_SIZE)} if columns else {}
    return Contents(values, merge_charts(runs, names), browsers)


def name_runs(runs: Sequence[Recorded]) -> list[str]:
    """Return a name for each run: its own, or as much of its path as tells it from the others."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        paths = [run.workdir.resolve().parts for run in runs]
        shared = 0
        while len({path[: shared + 1] for path in paths}) == 1:
            shared += 1
        names = [str(Path(*path[shared:])) if path[shared:] else path[-1] for path in paths]
    return names


def sum_up(runs: Sequence[Recorded], names: Sequence[str]) -> list[Column]:
    """Return the columns of a table with a row for each run: its newest values, and its best."""
    found = [
        Column("run", "the last part of its workdir", tuple(names)),
        Column("state", "how far it is", tuple(describe_state(run) for run in runs)),
    ]
    tables = [{one.name: one for one in list_columns(run)} for run in runs]
    for name in dict.fromkeys(name for table in tables for name in table):
        about = next(table[name].about for table in tables if name in table)
        find = _find_end if name == _NOTE else _find_last
        cells = tuple(find(table[name].cells) if name in table else _NONE for table in tables)
        found.append(Column(name, about, cells))
    best = tuple(_describe_best(run) for run in runs)
    about = "the best round by its held-out reward, whose policy is kept"
    return [*found, Column("best", about, best)] if set(best) != {_NONE} else found


def _describe_best(run: Recorded) -> str:
    """Return the number and the reward of the best round, if it was chosen from several."""
    best = read_best(run.rounds[-1]) if run.rounds else None
    if best is None or best.reward is None or best.of < 2:
        return _NONE
    return f"round {best.round}, {best.reward:.3f}"


def _find_end(cells: Sequence[str]) -> str:
    """Return what a column says of the last round, not of an earlier one."""
    return cells[-1] if cells else _NONE


def _find_last(cells: Sequence[str]) -> str:
    """Return the newest value of a column."""
    return next((cell for cell in reversed(cells) if cell != _NONE), _NONE)


def list_differences(runs: Sequence[Recorded]) -> list[tuple[str, list[str]]]:
    """Return (field, its value in each run) for the fields of the config that differ."""
    flat = [dict(schema.flatten(plain)) for plain in fill_loss(*(run.plain for run in runs))]
    found = []
    for path in sorted({path for one in flat for path in one}):
        values = [_show(one, path) for one in flat]
        if len(set(values)) > 1 and not path.startswith(_NO_DIFFERENCE):
            found.append((path, values))
    return found


def _show(flat: Mapping[str, Any], path: str) -> str:
    if path not in flat:
        return _NONE
    value = flat[path]
    return value if isinstance(value, str) and value else repr(value)


def merge_charts(runs: Sequence[Recorded], names: Sequence[str]) -> list[Chart]:
    """Return the charts that any run has, each with the first line of every run that has it."""
    charts: dict[str, Chart] = {}
    for run, name in zip(runs, names, strict=True):
        for chart in make_charts(run):
            if chart.lines[0].style == "bar":
                continue  # stages of several runs do not stand in one stack
            line = _rename(chart.lines[0], name)
            known = charts.get(chart.name) or _name_line(chart)
            charts[chart.name] = dataclasses.replace(known, lines=(*known.lines, line))
    return list(charts.values())


def _name_line(chart: Chart) -> Chart:
    """Return a chart without lines that says which of its lines is to be compared."""
    name = chart.lines[0].name
    if any(line.name == f"{name}, unsmoothed" for line in chart.lines):
        name += ", smoothed"
    about = f"{chart.about} Shown: {name}.".strip() if len(chart.lines) > 1 else chart.about
    return dataclasses.replace(chart, lines=(), about=about, marks=())


def _rename(line: Line, name: str) -> Line:
    return dataclasses.replace(line, name=name)


def _list_samples(runs: Sequence[Recorded], names: Sequence[str]) -> list[SampleColumn]:
    """Return a column for the newest evaluation of each run, behind that of the first SFT policy.

    There is none if the runs have not been evaluated on the same prompts.
    """
    columns = [list_held_out(run) for run in runs]
    if not all(columns):
        return []
    held_out = {run.rounds[0].prompts if run.rounds else "" for run in runs}
    if len(held_out) > 1:
        return []
    newest = [
        SampleColumn(f"{name}, {found[-1].label}", found[-1].path)
        for name, found in zip(names, columns, strict=True)
    ]
    first = columns[0][0]
    return newest if len(columns[0]) < 2 else [first, *newest]

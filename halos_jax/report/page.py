"""A page: one HTML file, with its style, its scripts, its data and the library of its charts.

Text of models is data there. What the template shows is escaped; samples are in blocks of base64
and become text nodes. A Content-Security-Policy lets run nothing but the scripts that this module
has hashed, and load nothing at all.
"""

import base64
import dataclasses
import functools
import hashlib
import importlib.resources
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from halos_jax.report.charts import Chart, keep_known
from halos_jax.report.facts import (
    describe_state,
    list_columns,
    list_commands,
    list_config,
    list_environment,
    list_facts,
    list_remarks,
    show_time,
)
from halos_jax.report.glance import answer_all
from halos_jax.report.recorded import Recorded
from halos_jax.report.round_charts import draw_rounds, draw_times
from halos_jax.report.samples import (
    Browser,
    choose_columns,
    collect_held_out,
    collect_trained,
    correlate_length,
)
from halos_jax.report.squeeze import squeeze, squeeze_json
from halos_jax.report.step_charts import draw_steps

# Characters of base64 for samples; with the library (2 MB) and the rest a page stays below 10 MB.
HELD_OUT_SIZE = 4_000_000
TRAINED_SIZE = 2_000_000

MARKS = {"good": "✓", "watch": "!", "bad": "✕", "unknown": "?"}
_SCRIPTS = ("data.js", "charts.js", "samples.js")
_NO_LIBRARY = (
    "Plotly is not installed where this page was written, so it has no curves: pip install plotly, "
    "and write it again with --config.mode=report."
)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a page shows: the variables of its template, its charts, and samples by their names."""

    values: Mapping[str, Any]
    charts: Sequence[Chart]
    browsers: Mapping[str, Browser] = dataclasses.field(default_factory=dict)


def make_charts(run: Recorded) -> list[Chart]:
    """Return the charts of a run that have a point."""
    steps = draw_steps(run.metrics)
    if not run.rounds:
        return keep_known(steps)
    return keep_known([*draw_rounds(run), draw_times(run.times), *steps])


def describe_run(run: Recorded) -> Contents:
    """Return what the page of one run shows."""
    columns, said = choose_columns(run)
    held_out = collect_held_out(columns, HELD_OUT_SIZE)
    trained = collect_trained(run, TRAINED_SIZE)
    slope = correlate_length(columns[-1].path) if columns else None
    held_out = dataclasses.replace(held_out, left_out=(*said, *held_out.left_out))
    values = {
        "title": run.name,
        "state": describe_state(run),
        "facts": list_facts(run),
        "answers": answer_all(run, length_reward=slope),
        "columns": list_columns(run) if run.rounds else [],
        "remarks": list_remarks(run),
        "config": list_config(run),
        "environment": list_environment(run),
        "commands": list_commands(run),
    }
    browsers = {"held_out": held_out, "trained": trained}
    return Contents(values, make_charts(run), browsers)


def render(contents: Contents) -> str:
    """Return the page as HTML."""
    library = load_library()
    browsers = {name: one for name, one in contents.browsers.items() if one.prompts}
    blocks = {"charts": squeeze_json([dataclasses.asdict(one) for one in contents.charts])}
    for name, one in browsers.items():
        blocks[name] = squeeze_json({"columns": one.columns, "prompts": one.prompts})
    if library is not None:
        blocks["plotly"] = library[1]
    script = "".join(read_part(name) for name in _SCRIPTS)
    allowed = [hash_script(script), *([library[0]] if library is not None else [])]
    template = _environment().from_string(read_part("page.html"))
    page: str = template.render(
        **{"overview": [], "answers": [], "columns": [], **contents.values},
        policy=make_policy(allowed),
        made=show_time(time.time()),
        marks=MARKS,
        sections=_list_sections(contents, browsers),
        has_charts=bool(contents.charts),
        chart_note="" if library is not None else _NO_LIBRARY,
        browsers=[
            (name, _TITLES[name], len(one.prompts), one.left_out) for name, one in browsers.items()
        ],
        blocks=list(blocks.items()),
        style=read_part("page.css"),
        script=script,
    )
    return page


_TITLES = {"held_out": "Held-out prompts", "trained": "Training samples"}


def _list_sections(contents: Contents, browsers: Mapping[str, Browser]) -> list[tuple[str, str]]:
    values = contents.values
    sections = [
        ("glance", "Glance", bool(values.get("answers"))),
        ("overview", "Runs", bool(values.get("overview"))),
        ("curves", "Curves", bool(contents.charts)),
        ("rounds", "Rounds", bool(values.get("columns"))),
        ("samples", "Samples", bool(browsers)),
        ("remarks", "Warnings and advice", bool(values.get("remarks"))),
        ("config", "Config", bool(values.get("config"))),
        ("repeat", "Repeat", bool(values.get("commands"))),
    ]
    return [(anchor, name) for anchor, name, is_there in sections if is_there]


# --------------------------------------------------------------------------- the parts


@functools.cache
def read_part(name: str) -> str:
    """Return the text of a file of `halos_jax/report/page`."""
    return (importlib.resources.files(__package__) / "page" / name).read_text("utf-8")


@functools.cache
def load_library() -> tuple[str, str] | None:
    """Return Plotly's hash and its text in base64; None if it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    text: str = get_plotlyjs()
    return hash_script(text), squeeze(text)


def hash_script(text: str) -> str:
    """Return what a policy calls a script whose text is this, and no other."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def make_policy(scripts: Sequence[str]) -> str:
    """Return a Content-Security-Policy under which these scripts run, and nothing is loaded."""
    return (
        f"default-src 'none'; script-src {' '.join(scripts)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


@functools.cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
    made.filters["split_flags"] = split_flags
    return made


def split_flags(text: str) -> list[str]:
    """Return a text in parts: every other one, from the second on, is a flag (`--name=value`).

    The template keeps a flag on one line, where a browser would break it behind its hyphens.
    """
    return re.split(r"((?<!\S)--\S+)", text)


def write_page(page: str, path: Path) -> int:
    """Replace the file at `path` by a page; return its size. A reader sees the old or the new."""
    data = page.encode(errors="replace")  # names of files may hold bytes that are no UTF-8
    path.parent.mkdir(parents=True, exist_ok=True)
    # By its process: the run and mode=report may write at the same time.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)  # not synced: a page that is lost can be written again
    partial.replace(path)
    return len(data)

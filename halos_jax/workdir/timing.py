"""How long each stage of each round took: `workdir/timings.jsonl`, for people and the benchmark.

A stage that is interrupted leaves no line. If it is resumed, only the time from then on counts. A
stage that is done again replaces its earlier line.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from halos_jax import storage
from halos_jax.workdir.ledger import Ledger

FILE = "timings.jsonl"


@contextlib.contextmanager
def time_stage(ledger: Ledger, round: int, stage: str) -> Iterator[Callable[[], None]]:
    """Record the start and end (seconds since 1970) of the block, unless it raises.

    Yields a function that records the stage as ending now. Call it before anything after which a
    resumed run would not repeat the stage, such as the start of a save. Only process 0 writes.
    """
    start = time.time()

    def write() -> None:
        if ledger.is_writer:
            line = {"round": round, "stage": stage, "start": start, "end": time.time()}
            _put(ledger, line)

    yield write
    write()


def _put(ledger: Ledger, line: dict[str, Any]) -> None:
    this = (line["round"], line["stage"])
    others = [one for one in read_times(ledger.workdir) if (one["round"], one["stage"]) != this]
    data = "".join(json.dumps(one) + "\n" for one in [*others, line]).encode()
    storage.write_bytes_atomic(ledger.workdir / FILE, data, note=ledger.note_file)


def read_times(workdir: str | Path) -> list[dict[str, Any]]:
    """Return the records in the file in order; lines that are not records are left out."""
    path, times = Path(workdir) / FILE, []
    for line in path.read_text("utf-8").split("\n")[:-1] if path.exists() else ():
        with contextlib.suppress(ValueError):  # a torn line of a version that appended to the file
            times.append(json.loads(line))
    known = {"round", "stage", "start", "end"}
    return [one for one in times if isinstance(one, dict) and known <= one.keys()]


def format_times(workdir: str | Path, round: int) -> str:
    """Return "sample 12.3 s, train 4.5 s, ..." for a round, with the time outside all stages."""
    times = [one for one in read_times(workdir) if one["round"] == round]
    if not times:
        return ""
    parts = [f"{one['stage']} {one['end'] - one['start']:.1f} s" for one in times]
    between = sum(
        max(after["start"] - before["end"], 0.0) for before, after in itertools.pairwise(times)
    )
    return ", ".join([*parts, f"between {between:.1f} s"])

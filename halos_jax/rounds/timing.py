"""How long each stage of each round took: `workdir/timings.jsonl`, for people and the benchmark.

The times are no part of the run's state, and a resumed run has other ones: a stage that was cut
short leaves no line, and one that is carried on counts from there.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "timings.jsonl"


@contextlib.contextmanager
def time_stage(workdir: Path | None, round: int, stage: str) -> Iterator[None]:
    """Append the start and end (seconds since 1970) of the block to the file, if it ends well.

    `workdir` is None on the processes that write no files.
    """
    start = time.time()
    yield
    if workdir is not None:
        line = {"round": round, "stage": stage, "start": start, "end": time.time()}
        with open(workdir / FILE, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def read_times(workdir: str | Path) -> list[dict[str, Any]]:
    """Return the lines of the file in their order; one that a crash has torn is left out."""
    path, times = Path(workdir) / FILE, []
    for line in path.read_text("utf-8").split("\n")[:-1] if path.exists() else ():
        # Behind a torn line stands, on the same line, what the next process has appended.
        with contextlib.suppress(ValueError):
            times.append(json.loads(line))
    return times


def format_times(workdir: str | Path, round: int) -> str:
    """Return "sample 12.3 s, train 4.5 s, ..." of a round, and what was in no stage."""
    times = [one for one in read_times(workdir) if one["round"] == round]
    if not times:
        return ""
    parts = [f"{one['stage']} {one['end'] - one['start']:.1f} s" for one in times]
    between = sum(
        max(after["start"] - before["end"], 0.0) for before, after in itertools.pairwise(times)
    )
    return ", ".join([*parts, f"between {between:.1f} s"])

"""Metrics, read one step late and handed to sinks: a JSON Lines file, the console.

Names are those of HALOs ("loss/train", "rewards_train/margins", "counters/lr"); values are JSON
numbers. A compiled step returns before the device has run it, so reading its metrics at once would
block the host. `MetricWriter` therefore holds them until the next step has been started.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import jax
import numpy as np

from halos_jax import processes
from halos_jax.console.values import describe_step
from halos_jax.console.watchdog import sign_of_life
from halos_jax.errors import UserError
from halos_jax.storage import Note, WorkdirError, write_bytes_atomic

# A run cannot recover from a loss or gradient that is not finite, so it stops.
MUST_BE_FINITE = ("loss/train", "grad_norm")

# Name in the file of the time of a record, in seconds since 1970.
WALL_TIME = "wall_time"
# Metrics that say how long something took or how fast it was; see `is_time`.
_TIMES = (
    WALL_TIME,
    "examples_per_second",
    "tokens_per_second",
    "sampled_tokens_per_second",
    "tflops_per_device",
    "mfu",
    "seconds",
)

_PAUSE = 5.0  # seconds between two lines on the console

logger = logging.getLogger(__name__)

_Key = tuple[int, float | None, frozenset[str]]


class NonFiniteError(UserError, FloatingPointError):
    """The training loss or the gradient norm of a step is not finite."""


class MetricsError(UserError, ValueError):
    """A metrics file has a line that is not a record."""


@dataclasses.dataclass(frozen=True)
class Record:
    """The metrics of one step, as sinks get them.

    `wall_time` (seconds since 1970) is the time at which the writer got them, which is about when
    the step was started. Values may be NaN or infinite.

    Example: `Record(7, {"loss/train": 0.69, "counters/examples": 64}, wall_time=1764141234.5)`.
    """

    step: int
    values: Mapping[str, int | float]
    wall_time: float

    @property
    def key(self) -> _Key:
        """The record's identity: a resumed run may repeat it, with the times of other stages."""
        names = frozenset(name for name in self.values if not is_time(name))
        return self.step, self.values.get("round"), names


class Sink(Protocol):
    """Where records go: a file, a console, a service. See `SINKS`."""

    def resume(self, step: int | None) -> Sequence[Record]:
        """Prepare for a run that goes on from `step`; called once, before all else.

        The sink must forget the records of later steps, which will be taken again: none if `step`
        is None, all if it is -1.

        Returns:
          the records of the last step that it keeps, which will not be written again; empty if the
          sink cannot tell.
        """

    def write(self, record: Record) -> None:
        """Write a record; records come in the order of their steps."""

    def flush(self) -> None:
        """Make everything written so far durable, since a checkpoint is saved next."""

    def close(self) -> None:
        """Close files and connections; called once, even after an error."""


@dataclasses.dataclass(frozen=True)
class Destination:
    """What a sink may need to know about the run; see the arguments of `MetricWriter`."""

    path: Path | None
    console: bool = False
    note: Note | None = None


class _JsonLines:
    """Appends `{"step": k, name: value, ...}` to a file, which can be read at any time."""

    def __init__(self, path: Path, note: Note | None) -> None:
        self._path, self._note = path, note
        self._size, self._sha256 = 0, hashlib.sha256()
        self._file: BinaryIO | None = None

    def resume(self, step: int | None) -> Sequence[Record]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        last = _trim(self._path, step, self._note)
        self._file = open(self._path, "ab")  # noqa: SIM115 (closed by close)
        self._count(self._path.read_bytes())
        return last

    def write(self, record: Record) -> None:
        assert self._file is not None, "resume comes first"
        values = {"step": record.step, WALL_TIME: round(record.wall_time, 3), **record.values}
        # JSON has no NaN: values that are not finite become null, which read_metrics reads as NaN.
        line = json.dumps({k: v if math.isfinite(v) else None for k, v in values.items()})
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self._count(line.encode() + b"\n")

    def flush(self) -> None:
        if self._file is not None and self._note is not None:
            os.fsync(self._file.fileno())
            self._note(self._path, self._size, self._sha256.hexdigest())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _count(self, data: bytes) -> None:
        self._size += len(data)
        self._sha256.update(data)


class _Console:
    """Says in a short line how an evaluation went, at most one every few seconds."""

    def __init__(self) -> None:
        self._due = 0.0

    def resume(self, step: int | None) -> Sequence[Record]:
        return ()

    def write(self, record: Record) -> None:
        if "loss/eval" in record.values and record.wall_time >= self._due:
            self._due = record.wall_time + _PAUSE
            logger.info("step %d: %s", record.step, describe_step(record.values))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


# Name -> function that makes the sink, or returns None if the run does not want it. A new kind of
# sink is a class and a line here.
SINKS: dict[str, Callable[[Destination], Sink | None]] = {
    "jsonl": lambda to: _JsonLines(to.path, to.note) if to.path else None,
    "console": lambda to: _Console() if to.console else None,
}


class MetricWriter:
    """Hands records to the sinks, one step late, and stops the run at a loss that is not finite.

    A record is identified by its step, its "round" if it has one, and its names, so that a resumed
    run that repeats the evaluation at its checkpoint does not write it twice.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        console: bool = False,
        resume_step: int | None = None,
        note: Note | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        """Open the sinks; all processes of a job must do so together.

        Args:
          path: the JSON Lines file; None (on processes other than 0): no file. An incomplete last
            line, left by a killed writer, is removed.
          console: also say in a line how evaluations went.
          resume_step: the step that the run goes on from; later records are removed (-1: all).
          note: called at each flush, once the file is on disk, with its path, its size and the
            SHA-256 of its bytes.
          sinks: further ones, which get a record after those of `SINKS`.

        Raises:
          MetricsError: if the file has a line that is not a record.
          WorkdirError: if it cannot be written.
        """
        self._held: Record | None = None
        self._known: set[_Key] = set()
        self._last_step: int | None = None
        to = Destination(None if path is None else Path(path), console, note)
        made = [make(to) for make in SINKS.values()]
        self._sinks = [*(sink for sink in made if sink is not None), *sinks]
        # Together, since the others would wait at the first step for one that cannot read its file.
        processes.run_on_all(lambda: self._resume(resume_step), MetricsError, WorkdirError)

    def _resume(self, step: int | None) -> None:
        for sink in self._sinks:
            for record in sink.resume(step):
                self._last_step = record.step
                self._known.add(record.key)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hold the `metrics` (scalars, on the device or not) of `step`; write those held before.

        Raises:
          NonFiniteError: if the loss or gradient norm of the *previous* step is not finite.
        """
        sign_of_life()
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        previous, self._held = self._held, Record(int(step), dict(metrics), time.time())
        if previous is not None:
            self._write_now(previous)

    def flush(self) -> None:
        """Wait for the metrics held and write them; call it before a checkpoint and at the end.

        Raises:
          NonFiniteError: as `write`, for the step that was held.
        """
        held, self._held = self._held, None
        if held is not None:
            self._write_now(held)
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Flush, and close the sinks."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._sinks.clear)
            for sink in self._sinks:
                stack.callback(sink.close)
            self.flush()

    def _write_now(self, held: Record) -> None:
        step = held.step
        values = {name: _to_number(name, value) for name, value in held.values.items()}
        record = dataclasses.replace(held, values=values)
        if step != self._last_step:
            self._known, self._last_step = set(), step
        if record.key not in self._known:
            self._known.add(record.key)
            for sink in self._sinks:
                sink.write(record)
        bad = [
            f"{name} is {values[name]}"
            for name in MUST_BE_FINITE
            if not math.isfinite(values.get(name, 0.0))
        ]
        if bad:
            raise NonFiniteError(
                f"step {step}: {', '.join(bad)}; the run stops and the last good checkpoint is "
                "kept; lower optimizer.learning_rate or optimizer.max_grad_norm and run it again: "
                "it goes on from there; or look at the examples of this step"
            )


def is_time(name: str) -> bool:
    """Tell whether a metric is of time: it differs between two runs that compute the same."""
    return name in _TIMES or name.startswith("seconds/")


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Return the records of a metrics file in order, without an incomplete last line.

    Raises:
      MetricsError: with file and line, for a line that is not a record.
    """
    return _read_lines(Path(path))[0]


def _to_number(name: str, value: object) -> int | float:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind in "OSU":
        raise TypeError(f"metric {name!r}: got {value!r}, allowed: one number")
    scalar = array.reshape(())
    return int(scalar) if scalar.dtype.kind in "biu" else float(scalar)


def _trim(path: Path, resume_step: int | None, note: Note | None) -> list[Record]:
    """Cut `path` back to whole records of steps up to `resume_step`; return those of the last."""
    if not path.exists():
        return []
    records, lines, is_torn = _read_lines(path)
    kept = [
        index
        for index, record in enumerate(records)
        if resume_step is None or record["step"] <= resume_step
    ]
    if is_torn or len(kept) < len(records):
        data = "".join(lines[index] + "\n" for index in kept).encode()
        write_bytes_atomic(path, data, note=note)
    last = max((records[index]["step"] for index in kept), default=None)
    return [
        _make_record(records[index])
        for index in kept
        if last is not None and records[index]["step"] == last
    ]


def _make_record(line: Mapping[str, float]) -> Record:
    values = {name: value for name, value in line.items() if name not in ("step", WALL_TIME)}
    wall_time = line.get(WALL_TIME, math.nan)  # files of before have none
    return Record(int(line["step"]), values, wall_time=wall_time)


def _read_lines(path: Path) -> tuple[list[dict[str, float]], list[str], bool]:
    """Return `(records, their lines, whether the last line is incomplete)`."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    # A line's newline is written last, so anything after the last newline is incomplete.
    is_torn = lines.pop() != ""
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = record["step"]
            if not isinstance(step, int):
                raise TypeError(f"step is {step!r}")
        except (ValueError, TypeError, KeyError) as error:
            raise MetricsError(
                f"{path}:{number}: not a metrics record ({type(error).__name__}: {error}); "
                'allowed: one JSON object a line with an integer "step"; remove the line'
            ) from error
        records.append({name: math.nan if v is None else v for name, v in record.items()})
    return records, lines, is_torn

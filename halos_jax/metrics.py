"""Metrics as JSON Lines, read one step late, and progress bars.

Names are those of HALOs ("loss/train", "rewards_train/margins", "counters/lr"); values are JSON
numbers. A compiled step returns before the device has run it; reading its metrics at once would
make the host wait. So `MetricWriter` holds them until the next step has been started.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import jax
import numpy as np
from tqdm import tqdm

from halos_jax.errors import UserError
from halos_jax.storage import Note, write_bytes_atomic

# A run whose loss or gradient is not finite is over: it stops instead of writing noise.
MUST_BE_FINITE = ("loss/train", "grad_norm")


class NonFiniteError(UserError, FloatingPointError):
    """The training loss or the gradient norm of a step is not finite."""


class MetricsError(UserError, ValueError):
    """A metrics file holds what is no record."""


class MetricWriter:
    """Appends `{"step": k, name: value, ...}` records to a file, one step late.

    A record is known by its step, its "round" where it has one, and its names: a resumed run that
    repeats an evaluation at the step of its checkpoint does not write it twice.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        console: bool = False,
        console_every: int = 1,
        resume_step: int | None = None,
        note: Note | None = None,
    ) -> None:
        """Open `path` for appending; None (on processes other than 0) writes no file.

        Args:
          path: the JSON Lines file. A torn last line, left by a killed writer, is removed.
          console: also print records, one a line.
          console_every: of the training steps, print each such one.
          resume_step: the step that the run goes on from; later records are removed (-1: all).
          note: called with the file, its size and the SHA-256 of its bytes at each flush, when
            they are on disk.
        """
        self._held: tuple[int, dict[str, Any]] | None = None
        self._console = console
        self._console_every = console_every
        self._known: set[tuple] = set()
        self._last_step: int | None = None
        self._file: BinaryIO | None = None
        self._note = note
        self._size, self._sha256 = 0, hashlib.sha256()
        if path is not None:
            self._path = path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            records = _trim(path, resume_step, note)
            if records:
                self._last_step = records[-1]["step"]
                self._known = {_key(record) for record in records}
            self._file = open(path, "ab")  # noqa: SIM115 (closed by close)
            self._count(path.read_bytes())

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hold `metrics` (scalars, on the device or not) of `step`; write those held before.

        Raises:
          NonFiniteError: where the loss or gradient norm of the step *before* is not finite.
        """
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        previous, self._held = self._held, (int(step), dict(metrics))
        if previous is not None:
            self._write_now(*previous)

    def flush(self) -> None:
        """Write what is held, waiting for it; call it before a checkpoint and at the end.

        Raises:
          NonFiniteError: as `write`.
        """
        held, self._held = self._held, None
        if held is not None:
            self._write_now(*held)
        if self._file is not None and self._note is not None:
            os.fsync(self._file.fileno())
            self._note(self._path, self._size, self._sha256.hexdigest())

    def close(self) -> None:
        """Flush, and close the file."""
        try:
            self.flush()
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _count(self, data: bytes) -> None:
        self._size += len(data)
        self._sha256.update(data)

    def _write_now(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = {name: _to_number(name, value) for name, value in metrics.items()}
        record = {"step": step, **values}
        if step != self._last_step:
            self._known, self._last_step = set(), step
        if _key(record) not in self._known:
            self._known.add(_key(record))
            # JSON has no NaN; what is not finite becomes null, and read_metrics turns it back.
            line = json.dumps({k: v if math.isfinite(v) else None for k, v in record.items()})
            if self._file is not None:
                self._file.write(line.encode() + b"\n")
                self._file.flush()
                self._count(line.encode() + b"\n")
            if self._console and ("loss/train" not in record or step % self._console_every == 0):
                tqdm.write(_format_line(record))
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


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Return the records of a metrics file in order; a torn last line is left out.

    Raises:
      MetricsError: naming file and line of a record that is not one.
    """
    return _read_lines(Path(path))[0]


def make_progress(work: Iterable | int, description: str, *, enabled: bool) -> tqdm:
    """Return a progress bar over an iterable, or over a total to be counted by `update(n)`.

    It is silent where not `enabled` and on processes other than 0. Where stderr is no terminal (a
    log file), it prints a plain line every ten seconds instead of redrawing one.
    """
    total = work if isinstance(work, int) else None
    settings: dict[str, Any] = {
        "desc": description,
        "disable": not enabled or jax.process_index() != 0,
    }
    if sys.stderr.isatty():
        settings |= {"dynamic_ncols": True, "leave": False}
    else:
        layout = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
        settings |= {"file": _LineStream(sys.stderr), "mininterval": 10.0, "bar_format": layout}
    return tqdm(None if total is not None else work, total=total, **settings)


class _LineStream:
    """Turns tqdm's redrawing of one line into plain lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.replace("\r", "").strip()
        if line:
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()


def _key(record: Mapping[str, Any]) -> tuple:
    return (record["step"], record.get("round"), frozenset(record))


def _to_number(name: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind in "OSU":
        raise TypeError(f"metric {name!r}: got {value!r}, allowed: one number")
    scalar = array.reshape(())
    return int(scalar) if scalar.dtype.kind in "biu" else float(scalar)


def _format_line(record: Mapping[str, Any]) -> str:
    parts = [f"step {record['step']}"]
    parts += [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in record.items()
        if name != "step"
    ]
    return " | ".join(parts)


def _trim(path: Path, resume_step: int | None, note: Note | None) -> list[dict[str, float]]:
    """Cut `path` back to whole records of steps up to `resume_step`.

    Returns the records of the last step, whose repetition is to be recognised.
    """
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
    return [records[index] for index in kept if records[index]["step"] == last]


def _read_lines(path: Path) -> tuple[list[dict[str, float]], list[str], bool]:
    """Return `(records, their lines, whether the last line is torn)`."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    # The newline is written last: what stands behind the last one was cut off.
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

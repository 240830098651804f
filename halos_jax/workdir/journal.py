"""What the processes of a run have said: `workdir/journal.jsonl`, for people and the report.

    {"kind": "start", "time": 1764141234.5, "program": "0.1.0", "command": "python -m ..."}
    {"kind": "warning", "time": 1764141236.1, "text": "..."}

A line is added at each start, and for each warning of the package, the same text once. Nothing is
read back by the run: the file may be deleted.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = "journal.jsonl"
_MOST = 1000  # warnings of a run that are kept


@dataclasses.dataclass(frozen=True)
class Journal:
    """The starts of a run, oldest first, and its warnings."""

    starts: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[Mapping[str, Any], ...] = ()


@contextlib.contextmanager
def keep_journal(workdir: Path, *, is_new: bool, is_writer: bool = True) -> Iterator[None]:
    """Add a start to the workdir's journal, and the package's warnings inside the block.

    Args:
      is_new: forget what another run has left there: the run has just begun.
      is_writer: False on processes other than 0, which write nothing.
    """
    if not is_writer:
        yield
        return
    handler = _Keeper(workdir / FILE, is_new=is_new)
    handler.add({"kind": "start", "time": time.time(), **describe_start()})
    logger = logging.getLogger("halos_jax")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def read_journal(workdir: Path) -> Journal:
    """Return the starts and warnings in a workdir; lines that are neither are left out."""
    path = workdir / FILE
    lines = path.read_text("utf-8", errors="replace").split("\n") if path.is_file() else []
    found: dict[str, list[Mapping[str, Any]]] = {"start": [], "warning": []}
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            found[record["kind"]].append(record)
    return Journal(tuple(found["start"]), tuple(found["warning"]))


def describe_start() -> dict[str, str]:
    """Return the version and, where this process is the program, the command line."""
    found = {"program": _find_version()}
    if os.path.basename(os.path.dirname(os.path.abspath(sys.argv[0]))) == "halos_jax":
        found["command"] = shlex.join(["python", "-m", "halos_jax.main", *sys.argv[1:]])
    return found


def _find_version() -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("halos_jax")
    return ""


class _Keeper(logging.Handler):
    """Adds each warning of the package to the journal, the same text once."""

    def __init__(self, path: Path, *, is_new: bool) -> None:
        super().__init__(logging.WARNING)
        self._path, self._is_broken = path, False
        if is_new:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        self._known = {one.get("text") for one in read_journal(path.parent).warnings}

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except Exception:  # a message whose arguments do not fit it, as logging's own handlers do
            self.handleError(record)
            return
        if text in self._known or len(self._known) >= _MOST:
            return
        self._known.add(text)
        if len(self._known) == _MOST:
            text += f" (warning {_MOST}: no further ones are kept here)"
        self.add({"kind": "warning", "time": record.created, "text": text})

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line; a disk that takes none must not end the run, which will say so itself."""
        if self._is_broken:
            return
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                # In ASCII: the names of files may hold bytes that are no UTF-8.
                file.write(json.dumps(line) + "\n")
        except OSError:
            self._is_broken = True

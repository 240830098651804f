"""All answers of a judge, kept on disk so that no question is paid for twice."""

import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos_jax.data.records.formats import digest
from halos_jax.storage import open_append

logger = logging.getLogger(__name__)


class AnswerCache:
    """A file of JSON Lines that only grows: {"key", "text", "finish_reason", "model", "sha256"}.

    A line is synced before its answer is used, and holds a hash of the rest of it. Reading skips a
    line that a kill cut short or that was changed since; this is logged, and its question asked
    again. An answer after a line cut short starts on a line of its own. Several threads, and
    several jobs on one file system, may append, since a line is one write. Lines of a version that
    wrote no hashes are accepted.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._answers: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._torn = False
        self._broken = 0

    def load(self) -> None:
        """Read the file as it is now; it need not exist."""
        with self._lock:
            self._answers.clear()
            data = self.path.read_bytes() if self.path.exists() else b""
            self._torn = bool(data) and not data.endswith(b"\n")
            broken = 0
            for line in data.splitlines():
                answer = _parse_line(line)
                if answer is None:
                    broken += bool(line.strip())
                else:
                    self._answers[answer["key"]] = answer
            if broken > self._broken:
                logger.warning(
                    "%s: skipped %d broken lines, cut short or changed; their questions are asked "
                    "again",
                    self.path,
                    broken,
                )
            self._broken = broken

    def __len__(self) -> int:
        with self._lock:
            return len(self._answers)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the answer with `key`, or None."""
        with self._lock:
            return self._answers.get(key)

    def put(self, key: str, answer: Mapping[str, Any]) -> None:
        """Add an answer; when this returns, it is on disk."""
        line = json.dumps(_seal({"key": key, **answer})).encode() + b"\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Other jobs may append too, so half a line cannot be removed.
            with open_append(self.path) as descriptor:
                line = b"\n" + line if self._torn else line
                # A write that fills the disk may be short, and leaves a broken line.
                self._torn = True
                if os.write(descriptor, line) < len(line):
                    os.write(descriptor, b"\n")  # raises if there is no room for this either
                    raise OSError(f"{self.path}: an answer could not be written whole")
                self._torn = False
            self._answers[key] = {"key": key, **answer}


def make_key(url: str, body: Mapping[str, Any], repeat: int) -> str:
    """Return the key of an answer: a hash of the address, the question and the try (`repeat`)."""
    return digest("judge", url, json.dumps(body, sort_keys=True), repeat)


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    if not isinstance(answer, dict):
        return None
    names = ("key", "text", "finish_reason")
    if not all(isinstance(answer.get(name), str) for name in names):
        return None
    if "sha256" in answer:
        found = answer.pop("sha256")
        return answer if found == _seal(answer)["sha256"] else None
    # A line of an older version, which had only these names.
    return answer if answer.keys() <= {*names, "model"} else None


def _seal(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer with the hash of its fields."""
    return {**answer, "sha256": digest("answer", sorted(answer.items()))}

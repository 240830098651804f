"""All answers of a judge on disk: what was paid for once is never asked again."""

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

    A line is synced before its answer is used. A line that a kill cut short, or that is not as it
    was written by the hash of the rest in it, is passed over when the file is read: it is said, and
    asked once more. The next one starts on a line of its own. Several threads, and several jobs on
    one file system, may append: a line is one write. Lines of a version without hashes are taken.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._answers: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._torn = False
        self._broken = 0

    def load(self) -> None:
        """Read what the file has now; there may be no file yet."""
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
                    "%s: passed over %d broken lines, cut short or changed; what they answered is "
                    "asked again",
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
            # Other jobs may append too, so half a line cannot be taken back.
            with open_append(self.path) as descriptor:
                line = b"\n" + line if self._torn else line
                # A write that fills the disk may be short: what is left of it is a broken line.
                self._torn = True
                if os.write(descriptor, line) < len(line):
                    os.write(descriptor, b"\n")  # raises where there is no room for this either
                    raise OSError(f"{self.path}: an answer could not be written whole")
                self._torn = False
            self._answers[key] = {"key": key, **answer}


def make_key(url: str, body: Mapping[str, Any], repeat: int) -> str:
    """Return the name of an answer: a hash of where and what was asked, and which try it was."""
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
    # One of an older version, which had these names and no other.
    return answer if answer.keys() <= {*names, "model"} else None


def _seal(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer with the hash of all that it says."""
    return {**answer, "sha256": digest("answer", sorted(answer.items()))}

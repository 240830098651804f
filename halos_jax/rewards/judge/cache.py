"""All answers of a judge, kept on disk so that no question is paid for twice."""

import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos_jax.data.records.formats import digest
from halos_jax.json_text import JsonObject
from halos_jax.storage import open_append

logger = logging.getLogger(__name__)

_NAMES = ("key", "text", "finish_reason")


class AnswerCache:
    """A file of JSON Lines that only grows: {"key", "text", "finish_reason", "model", "sha256"}.

    A line is synced before its answer is used, and holds a hash of the rest of it. Reading skips a
    line that a kill cut short or that was changed since; this is logged, and its question asked
    again. An answer after a line cut short starts on a line of its own. Several threads, and
    several jobs on one file system, may append, since a line is one write.

    A file without any hash was written by an older version: its answers are accepted, which is
    logged, and written once more with their hashes before the first new one. From then on a line
    without a hash counts as changed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._answers: dict[str, JsonObject] = {}
        self._lock = threading.Lock()
        self._torn = False
        self._broken = 0
        self._unsealed: list[JsonObject] = []  # those of an older version's file

    def load(self) -> None:
        """Read the file as it is now; it need not exist."""
        with self._lock:
            self._answers.clear()
            data = self.path.read_bytes() if self.path.exists() else b""
            self._torn = bool(data) and not data.endswith(b"\n")
            lines = [line for line in data.splitlines() if line.strip()]
            sealed = [_parse_line(line) for line in lines]
            old = [_parse_old_line(line) for line in lines]
            is_old = b'"sha256"' not in data
            found = [answer for answer in (old if is_old else sealed) if answer is not None]
            self._answers.update((answer["key"], answer) for answer in found)
            if is_old and len(found) > len(self._unsealed):
                logger.warning(
                    "%s: %d answers of a version that wrote no hashes are accepted as they are: "
                    "nothing tells whether they were changed",
                    self.path,
                    len(found),
                )
            self._unsealed = found if is_old else []
            # `put` has written these once more, with their hashes.
            broken = sum(
                answer is None and (past is None or past["key"] not in self._answers)
                for answer, past in zip(sealed, old, strict=True)
            )
            if broken > self._broken:
                logger.warning(
                    "%s: skipped %d broken lines, cut short, changed or without their hash; their "
                    "questions are asked again",
                    self.path,
                    broken,
                )
            self._broken = broken

    def __len__(self) -> int:
        with self._lock:
            return len(self._answers)

    def get(self, key: str) -> JsonObject | None:
        """Return the answer with `key`, or None."""
        with self._lock:
            return self._answers.get(key)

    def put(self, key: str, answer: Mapping[str, Any]) -> None:
        """Add an answer; when this returns, it is on disk."""
        new = {"key": key, **answer}
        with self._lock:
            line = b"".join(_make_line(one) for one in (*self._unsealed, new))
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
            self._unsealed = []
            self._answers[key] = new


def make_key(url: str, body: Mapping[str, Any], repeat: int) -> str:
    """Return the key of an answer: a hash of the address, the question and the try (`repeat`)."""
    return digest("judge", url, json.dumps(body, sort_keys=True), repeat)


def _parse_line(line: bytes) -> JsonObject | None:
    """Return the answer of a line whose hash is right, else None."""
    answer = _parse_answer(line)
    if answer is None or "sha256" not in answer:
        return None
    found = answer.pop("sha256")
    return answer if found == _seal(answer)["sha256"] else None


def _parse_old_line(line: bytes) -> JsonObject | None:
    """Return the answer of a line as an older version wrote it, without a hash; else None."""
    answer = _parse_answer(line)
    return answer if answer is not None and answer.keys() <= {*_NAMES, "model"} else None


def _parse_answer(line: bytes) -> JsonObject | None:
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    if not isinstance(answer, dict):
        return None
    return answer if all(isinstance(answer.get(name), str) for name in _NAMES) else None


def _make_line(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(_seal(answer)).encode() + b"\n"


def _seal(answer: Mapping[str, Any]) -> JsonObject:
    """Return an answer with the hash of its fields."""
    return {**answer, "sha256": digest("answer", sorted(answer.items()))}

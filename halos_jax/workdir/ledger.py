"""A record of all that a run writes into its workdir: a line in `ledger.jsonl` before each file.

    {"path": "rounds/0001/manifest.json", "size": 812, "sha256": "...", "chain": "..."}
    {"path": "metrics.jsonl", "prefix": 4096, "sha256": "...", ...}   the start of a file that grows
    {"path": "final", "files": {"config.json": {...}}, ...}           a folder
    {"path": "checkpoints/00000004", "record": "...", ...}            a checkpoint, by its record
    {"path": "rounds/0003/manifest.json", "gone": true, ...}          deleted

A line is synced to disk before the file gets its final name. So a file matches the last line about
it. There is one exception: if a process was killed between the two, then that line is the last of
the ledger and the file matches the line before it. A file that matches neither was changed by
somebody else.

`chain` is a hash of the line and of the previous line's chain, so a line that is changed, removed,
repeated or moved is detected. Lines missing at the end are detected through the files that they
describe, and through checkpoints, which store the chain at the time of the save.
"""

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos_jax import storage
from halos_jax.storage import WorkdirError
from halos_jax.workdir import trees

FILE = "ledger.jsonl"

Entry = Mapping[str, Any]


@dataclasses.dataclass(slots=True)
class Ledger:
    """The lines of a workdir's ledger; made by `open_ledger`, `read_ledger` and `no_ledger`.

    `entries` maps each path to the last line about it. Paths in the workdir are relative to it.
    """

    workdir: Path
    is_writer: bool = False
    entries: dict[str, Entry] = dataclasses.field(default_factory=dict)
    chains: dict[str, None] = dataclasses.field(default_factory=dict)  # in order
    _before: tuple[str, Entry | None] | None = None  # the last line's path, and its previous line

    @property
    def is_empty(self) -> bool:
        """Whether nothing is recorded: the run is new, or from a version without ledgers."""
        return not self.chains

    @property
    def head(self) -> str:
        """The chain of the last line; a checkpoint stores it as proof of what came before."""
        return next(reversed(self.chains), "")

    def name(self, path: str | Path) -> str:
        """Return the name of a path in the ledger."""
        path, workdir = Path(path).absolute(), self.workdir.absolute()
        return path.relative_to(workdir).as_posix() if path.is_relative_to(workdir) else str(path)

    def find(self, path: str | Path) -> Entry | None:
        """Return the entry of a path that should exist, or None."""
        entry = self.entries.get(self.name(path))
        return None if entry is None or entry.get("gone") else entry

    def note_file(self, path: Path, size: int, sha256: str) -> None:
        """Record a file that is about to get its final name (a `storage.Note`)."""
        self.note(path, size=size, sha256=sha256)

    def note_prefix(self, path: Path, size: int, sha256: str) -> None:
        """Record the first `size` bytes of a growing file; they must be on disk already."""
        self.note(path, prefix=size, sha256=sha256)

    def note_tree(self, path: Path, made_at: Path) -> None:
        """Record a folder that is about to get its final name; its files are still in `made_at`."""
        if self.is_writer:
            self.note(path, files=trees.describe_tree(made_at))

    def note_gone(self, path: Path) -> None:
        """Record that a path is about to be deleted."""
        if self.find(path) is not None:
            self.note(path, gone=True)

    def note(self, path: str | Path, **entry: Any) -> None:
        """Append a line and sync it, unless it would repeat the path's last line."""
        name = self.name(path)
        if not self.is_writer or self.entries.get(name) == entry:
            return
        before = {} if self.chains else {"run": secrets.token_hex(8)}  # so chains differ
        line = {"path": name, **before, **entry}
        chain = _chain(self.head, line)
        data = json.dumps(line | {"chain": chain}, ensure_ascii=False).encode() + b"\n"
        with storage.explain_os_errors(self.workdir / FILE):
            storage.append_whole(self.workdir / FILE, data)
        self._take(name, entry, chain)

    def undo(self, path: str) -> bool:
        """Undo the last line, if it is about `path` and was not acted on; tell whether it was."""
        if self._before is None or self._before[0] != path:
            return False
        before = self._before[1]
        problem = check_entry(self.workdir, path, before) if before else None
        if problem or (before is None and (self.workdir / path).exists()):
            return False
        if check_entry(self.workdir, path, self.entries[path]) is None:
            return False  # the file matches both lines: the last one was acted on
        self.note(self.workdir / path, **(before or {"gone": True}))
        return True

    def is_pending(self, name: str) -> bool:
        """Tell whether the last line is about `name`, which is still as the line before says.

        So it is while a run is about to rename the file, or after it was killed there.
        """
        if self._before is None or self._before[0] != name:
            return False
        before = self._before[1]
        if before is None or before.get("gone"):
            return not (self.workdir / name).exists()
        return check_entry(self.workdir, name, before) is None

    def _take(self, name: str, entry: Entry, chain: str) -> None:
        self._before = (name, self.entries.get(name))
        self.entries[name], self.chains[chain] = entry, None


def no_ledger(workdir: str | Path = ".") -> Ledger:
    """Return a ledger that records nothing."""
    return Ledger(Path(workdir))


def read_ledger(workdir: str | Path) -> Ledger:
    """Read the ledger of a run that may be under way; it is empty if there is no file.

    Raises:
      WorkdirError: if a line is not as the run wrote it.
    """
    return _read(Path(workdir), is_writer=False)


def open_ledger(workdir: str | Path) -> Ledger:
    """Open the ledger of a run to write to it; see `read_ledger`. A torn last line is cut off."""
    ledger = _read(Path(workdir), is_writer=True)
    path = ledger.workdir / FILE
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return ledger


def check_entry(workdir: Path, name: str, entry: Entry) -> str | None:
    """Return what is wrong with a file or folder, or None if it matches `entry`."""
    path = workdir / name
    if entry.get("gone"):
        return f"{name} is there again" if path.exists() else None
    if "record" in entry:  # a checkpoint, whose content is checked when it is read
        return None if path.is_dir() else f"{name} is missing"
    if "files" in entry:
        return "; ".join(trees.find_wrong(path, entry["files"])) or None
    if not path.is_file():
        if entry.get("prefix") == 0:
            return None
        return f"{name} is missing"
    size = path.stat().st_size
    if "prefix" in entry:
        if size < entry["prefix"]:
            return f"{name} has {size} bytes, expected {entry['prefix']} or more"
        found = storage.hash_start(path, entry["prefix"])
    else:
        if size != entry["size"]:
            return f"{name} has {size} bytes, expected {entry['size']}"
        found = storage.hash_file(path)
    if found != entry["sha256"]:
        return f"{name} has sha256 {found[:12]}..., expected {entry['sha256'][:12]}..."
    return None


def _read(workdir: Path, *, is_writer: bool) -> Ledger:
    ledger, path = Ledger(workdir, is_writer=is_writer), workdir / FILE
    data = path.read_bytes() if path.exists() else b""
    for number, raw in enumerate(data.split(b"\n")[:-1], 1):
        try:
            line = json.loads(raw)
            chain, name = line.pop("chain"), line["path"]
            expected = _chain(ledger.head, line)
            entry = {key: value for key, value in line.items() if key not in ("path", "run")}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _broken(path, number, f"{type(error).__name__}: {error}") from error
        if chain != expected:
            raise _broken(path, number, "its hash does not follow from the lines before it")
        ledger._take(name, entry, chain)
    return ledger


def _chain(before: str, line: Mapping[str, Any]) -> str:
    text = json.dumps([before, line], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _broken(path: Path, number: int, reason: str) -> WorkdirError:
    return WorkdirError(
        f"{path}:{number}: not as the run wrote it ({reason}); put the original file back, or "
        "start a new run with --config.workdir=DIR"
    )

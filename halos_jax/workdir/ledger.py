"""What a run has written into its workdir: a line of `ledger.jsonl` before each file.

    {"path": "rounds/0001/manifest.json", "size": 812, "sha256": "...", "chain": "..."}
    {"path": "metrics.jsonl", "prefix": 4096, "sha256": "...", ...}   the start of a file that grows
    {"path": "final", "files": {"config.json": {...}}, ...}           a folder
    {"path": "checkpoints/00000004", "record": "...", ...}            a checkpoint, by its record
    {"path": "rounds/0003/manifest.json", "gone": true, ...}          taken away

A line is synced before the file takes its name. So a file is what the last line about it says or,
where a process was killed between the two, and then this line is the ledger's last, what the line
before says. A file that is neither was changed by somebody else. `chain` is a hash of the line and
of the chain before it, by which a line that is changed, left out, doubled or moved is seen. Lines
that are missing at the end are seen by the files that they speak of, and by the checkpoints, which
keep the chain as it stood when they were saved.
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

    `entries` holds the last line of each path, relative to the workdir where it is inside of it.
    """

    workdir: Path
    is_writer: bool = False
    entries: dict[str, Entry] = dataclasses.field(default_factory=dict)
    chains: dict[str, None] = dataclasses.field(default_factory=dict)  # in order
    _before: tuple[str, Entry | None] | None = None  # path of the last line, and its line before

    @property
    def is_empty(self) -> bool:
        """Whether nothing is recorded: the run is new, or older than ledgers are."""
        return not self.chains

    @property
    def head(self) -> str:
        """The chain of the last line, by which a checkpoint knows what was written before it."""
        return next(reversed(self.chains), "")

    def name(self, path: str | Path) -> str:
        """Return the name of a path in here."""
        path, workdir = Path(path).absolute(), self.workdir.absolute()
        return path.relative_to(workdir).as_posix() if path.is_relative_to(workdir) else str(path)

    def find(self, path: str | Path) -> Entry | None:
        """Return what is recorded of a path that should be there, or None."""
        entry = self.entries.get(self.name(path))
        return None if entry is None or entry.get("gone") else entry

    def note_file(self, path: Path, size: int, sha256: str) -> None:
        """Record a file that is about to take its name (a `storage.Note`)."""
        self.note(path, size=size, sha256=sha256)

    def note_prefix(self, path: Path, size: int, sha256: str) -> None:
        """Record the first `size` bytes of a file that grows, which are on disk."""
        self.note(path, prefix=size, sha256=sha256)

    def note_tree(self, path: Path, made_at: Path) -> None:
        """Record a folder that is about to take its name, whose files stand in `made_at`."""
        if self.is_writer:
            self.note(path, files=trees.describe_tree(made_at))

    def note_gone(self, path: Path) -> None:
        """Record that a path is about to be taken away."""
        if self.find(path) is not None:
            self.note(path, gone=True)

    def note(self, path: str | Path, **entry: Any) -> None:
        """Append a line and sync it; it is left out where it says what is known already."""
        name = self.name(path)
        if not self.is_writer or self.entries.get(name) == entry:
            return
        before = {} if self.chains else {"run": secrets.token_hex(8)}  # no two runs have one chain
        line = {"path": name, **before, **entry}
        chain = _chain(self.head, line)
        data = json.dumps(line | {"chain": chain}, ensure_ascii=False).encode() + b"\n"
        with storage.explain_os_errors(self.workdir / FILE):
            storage.append_whole(self.workdir / FILE, data)
        self._take(name, entry, chain)

    def undo(self, path: str) -> bool:
        """Take back the last line, if it is of `path` and what it says has not happened."""
        if self._before is None or self._before[0] != path:
            return False
        before = self._before[1]
        problem = check_entry(self.workdir, path, before) if before else None
        if problem or (before is None and (self.workdir / path).exists()):
            return False
        if check_entry(self.workdir, path, self.entries[path]) is None:
            return False  # both lines fit: it has happened
        self.note(self.workdir / path, **(before or {"gone": True}))
        return True

    def _take(self, name: str, entry: Entry, chain: str) -> None:
        self._before = (name, self.entries.get(name))
        self.entries[name], self.chains[chain] = entry, None


def no_ledger(workdir: str | Path = ".") -> Ledger:
    """Return a ledger in which nothing is written."""
    return Ledger(Path(workdir))


def read_ledger(workdir: str | Path) -> Ledger:
    """Read the ledger of a run that may be under way; empty where there is none.

    Raises:
      WorkdirError: where a line is not as a run has written it.
    """
    return _read(Path(workdir), is_writer=False)


def open_ledger(workdir: str | Path) -> Ledger:
    """Open the ledger of a run to go on with it, as `read_ledger`; a torn last line is cut off."""
    ledger = _read(Path(workdir), is_writer=True)
    path = ledger.workdir / FILE
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return ledger


def check_entry(workdir: Path, name: str, entry: Entry) -> str | None:
    """Return what is wrong with a file or folder, or None where it is as `entry` says."""
    path = workdir / name
    if entry.get("gone"):
        return f"{name} is there again" if path.exists() else None
    if "record" in entry:  # a checkpoint, which is checked by those that read it
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

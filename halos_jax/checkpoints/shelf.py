"""The folder of a run's checkpoints: which exist, which should exist, and which are deleted."""

import contextlib
import dataclasses
import logging
import re
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from halos_jax.checkpoints import saved
from halos_jax.storage import hash_file, sync_folder, sync_tree
from halos_jax.workdir.ledger import Ledger, no_ledger

logger = logging.getLogger(__name__)

_SAVED = re.compile(r"\d{8}")
_DAMAGED = re.compile(r"\d{8}\.damaged")
# Leftovers of a killed save or deletion. Only folders with names of these three forms are deleted.
_LEFTOVER = re.compile(r"\d{8}\.(orbax-checkpoint-tmp.*|deleting)")


@dataclasses.dataclass(frozen=True)
class Shelf:
    """Checkpoints by id. Changes require `is_writer`.

    The newest `keep` round-end ones stay, and the newest at the end of each of `rounds` (None: of
    every round).
    """

    folder: Path
    keep: int
    ledger: Ledger
    is_writer: bool
    rounds: Collection[int] | None = ()

    def path(self, save_id: int) -> Path:
        """Return the folder of a checkpoint."""
        return self.folder / f"{save_id:08d}"

    def ids(self) -> list[int]:
        """Return the ids of all complete checkpoints, in order."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(
            int(path.name)
            for path in paths
            if _SAVED.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        )

    def next_id(self) -> int:
        """Return an id that no checkpoint has ever had, including those deleted since."""
        return max([*self.ids(), *self._recorded(), 0]) + 1

    def missing(self) -> list[int]:
        """Return the ids of checkpoints that are in the ledger but not on disk, in order."""
        there = self.ids()
        known = [one for one in self._recorded() if self.ledger.find(self.path(one)) is not None]
        return [save_id for save_id in known if save_id not in there]

    def clear(self) -> None:
        """Make the folder if it is missing, and delete the leftovers of killed processes."""
        if self.is_writer:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if _LEFTOVER.fullmatch(path.name) and not path.is_symlink():
                    _remove(path)

    def sync(self, save_id: int) -> None:
        """Sync a complete checkpoint to disk, so that it survives a power failure."""
        if self.is_writer:
            # Orbax syncs the array files, but neither the folders nor the JSON file.
            sync_tree(self.path(save_id))
            sync_folder(self.folder)

    def note(self, save_id: int) -> None:
        """Record a complete checkpoint in the ledger."""
        if self.ledger.is_writer:
            record = hash_file(saved.find_record(self.folder, save_id))
            self.ledger.note(self.path(save_id), record=record)

    def check(self, save_id: int) -> str | None:
        """Return why a checkpoint is not the one that this run wrote, or None if it is."""
        try:
            found = hash_file(saved.find_record(self.folder, save_id))
            chain = saved.read_record(saved.find_record(self.folder, save_id)).ledger
        except saved.ERRORS as error:
            return f"{type(error).__name__}: {error}"
        entry = self.ledger.find(self.path(save_id))
        if entry is not None and found != entry["record"]:
            return "its record is not the one that was written"
        if chain and not self.ledger.is_empty and chain not in self.ledger.chains:
            return "it is of another run, or newer than the run's ledger"
        return None

    def set_aside(self, save_id: int) -> None:
        """Rename a damaged checkpoint; it is deleted when the next one is complete."""
        if self.is_writer:
            self.ledger.note_gone(self.path(save_id))
            self.path(save_id).rename(self.folder / f"{save_id:08d}.damaged")

    def forget(self, gone: Sequence[int]) -> None:
        """Log that checkpoints are missing, and record that they are gone."""
        for save_id in gone:
            logger.warning("%s is missing", self.path(save_id))
            self.ledger.note_gone(self.path(save_id))

    def prune(self, verified: int, *, damaged: bool = True) -> None:
        """Delete the checkpoints that are not needed now that `verified` has been verified.

        Those that were set aside go too if `damaged`.
        """
        if not self.is_writer:
            return
        older = [save_id for save_id in self.ids() if save_id < verified]
        ends = [save_id for save_id in older if not self._is_in_stage(save_id)]
        newest_is_end = not self._is_in_stage(verified)
        kept: set[int | None] = set(ends[max(len(ends) - self.keep + newest_is_end, 0) :])
        kept |= set(ends) if self.rounds is None else set(map(self.find_round_end, self.rounds))
        for save_id in older:
            if save_id not in kept:
                self.ledger.note_gone(self.path(save_id))
                # Rename it first, so that an interrupted deletion leaves nothing that looks whole.
                doomed = self.path(save_id).rename(self.folder / f"{save_id:08d}.deleting")
                shutil.rmtree(doomed)
        for path in self.folder.glob("*.damaged") if damaged else ():
            if _DAMAGED.fullmatch(path.name) and not path.is_symlink():
                shutil.rmtree(path)

    def find_round_end(self, round: int) -> int | None:
        """Return the id of the newest readable checkpoint at the end of `round`, or None."""
        for save_id in reversed(self.ids()):
            with contextlib.suppress(*saved.ERRORS):
                record = saved.read_record(saved.find_record(self.folder, save_id))
                if record.round_state.get("round") == round and not record.is_in_stage:
                    return save_id
        return None

    def _recorded(self) -> list[int]:
        first = self.ledger.name(self.path(0))[:-8]
        names = [name[len(first) :] for name in self.ledger.entries if name.startswith(first)]
        return sorted(int(name) for name in names if _SAVED.fullmatch(name))

    def _is_in_stage(self, save_id: int) -> bool:
        try:
            return saved.read_record(saved.find_record(self.folder, save_id)).is_in_stage
        except saved.ERRORS:
            return False  # unreadable: treat it as a round-end checkpoint


def find_sums(
    folder: Path, round: int = 0, *, save_id: int | None = None
) -> Mapping[str, Any] | None:
    """Return the checksums of the newest checkpoint at the end of `round`, or None; only read.

    Args:
      save_id: that of the checkpoint to take instead.
    """
    shelf = Shelf(folder, 1, no_ledger(folder), is_writer=False)
    if save_id is None:
        save_id = shelf.find_round_end(round)
    if save_id is None or save_id not in shelf.ids():
        return None
    return saved.read_record(saved.find_record(folder, save_id)).sums


def _remove(folder: Path) -> None:
    """Delete a folder, even if threads of a failed save still write into it."""
    for _ in range(20):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
        if not folder.exists():
            return
        time.sleep(0.1)
    shutil.rmtree(folder)

"""Checkpoints of a run: written asynchronously by Orbax, with the round state in the same commit.

A checkpoint is the folder `SAVE_ID` (8 digits) with two items: `state`, the train state as nested
dicts of arrays, and `round`, a JSON object with a checksum of each of their chunks (`saved.py`).
Save ids count saves, not optimizer steps: a round that trains zero steps is saved too, under a
newer id and the same step. A save is written under a temporary name and then renamed, so a folder
whose name has only digits is complete; other folders of saves are leftovers, deleted on opening.

Older checkpoints are deleted only once a newer one has been verified. The `keep` newest round-end
ones stay, and those that `keep_rounds` names; one taken within a stage (`round_state["in_stage"]`
true) is deleted after the next.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from halos_jax import processes
from halos_jax.checkpoints import checksums, failures, saved
from halos_jax.checkpoints.arrays import compare_arrays, describe_array, name_arrays
from halos_jax.checkpoints.failures import CheckpointError, DamagedError
from halos_jax.checkpoints.saved import Saved
from halos_jax.checkpoints.shelf import Shelf
from halos_jax.storage import WorkdirError
from halos_jax.workdir.ledger import Ledger, no_ledger

logger = logging.getLogger(__name__)

# How long processes wait for each other's part of a save. Orbax's default of ten minutes is too
# short for a large model on network storage.
_TIMEOUT_SECONDS = 3600

# The errors that all processes of a job raise if one of them does, the worst last.
_KINDS = (DamagedError, CheckpointError, WorkdirError)


def open_checkpoints(
    folder: str | Path, *, keep: int, ledger: Ledger | None = None
) -> "Checkpoints":
    """Open `folder`, made if it is missing, and delete the leftovers of killed processes.

    Every process of a job calls this. The caller must hold the lock of the workdir; each checkpoint
    is recorded in its ledger.
    """
    return Checkpoints(folder, keep=keep, ledger=ledger)


def read_checkpoints(folder: str | Path) -> "Checkpoints":
    """Open the checkpoints of a run, which may be under way, for reading only."""
    return Checkpoints(folder, keep=1, read_only=True)


class Checkpoints:
    """The checkpoints in one folder; made by `open_checkpoints`.

    Every method must be called on all processes of the job.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int,
        ledger: Ledger | None = None,
        read_only: bool = False,
    ) -> None:
        self._folder = Path(folder).absolute()
        self._ledger = ledger or no_ledger(self._folder)
        self._pending: int | None = None
        self._verified = 0  # the newest checkpoint that was found intact
        is_writer = jax.process_index() == 0 and not read_only
        self._shelf = Shelf(self._folder, keep, self._ledger, is_writer)
        processes.run_on_all(self._shelf.clear, *_KINDS)
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.PyTreeCheckpointHandler(), round=ocp.JsonCheckpointHandler()
            ),
            timeout_secs=_TIMEOUT_SECONDS,
        )
        # This one reads without waiting for the other processes, since one of them may fail.
        self._reader = ocp.PyTreeCheckpointHandler()
        self._next: int = processes.decide_on_first(self._shelf.next_id, *_KINDS)

    # ------------------------------------------------------------------- writing

    def save(self, step: int, state: Any, round_state: Mapping[str, Any]) -> int:
        """Start a save and return its id; `state` may be donated as soon as this returns.

        Orbax copies the arrays to the host before it returns and writes them in the background.
        A save still under way is finished first. Call `MetricWriter.flush` before, so that a
        state after a non-finite loss is never saved.

        Args:
          step: optimizer steps of the whole run (`TrainState.step`).
          state: a pytree of arrays.
          round_state: a JSON object; `in_stage` true marks a checkpoint inside a stage. `step` is
            added to it.

        Raises:
          CheckpointError: if this save or the previous one fails, for example on a full disk.
        """
        self.finish()
        arrays = name_arrays(state)
        round_state = {**round_state, "step": int(step)}
        # A round state that is not JSON must fail here, not in Orbax's thread.
        record = saved.make_record(round_state, arrays, {}, self._ledger.head)
        sums = checksums.compute(arrays)
        record = saved.make_record(round_state, arrays, sums, self._ledger.head)
        self._size = sum(leaf.nbytes for leaf in arrays.values())
        save_id, self._next = self._next, self._next + 1
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(traverse_util.unflatten_dict(arrays, sep="/")),
            round=ocp.args.JsonSave(record),
        )
        try:
            self._checkpointer.save(self._shelf.path(save_id), args=arguments)
        except Exception as error:
            raise self._write_failed(save_id, error) from error
        self._pending = save_id
        return save_id

    def finish(self) -> None:
        """Wait for the save under way, verify it, and only then delete what it replaces.

        Raises:
          CheckpointError: if the save failed or cannot be read back; then nothing is deleted.
        """
        if self._pending is None:
            return
        save_id, self._pending = self._pending, None
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:
            raise self._write_failed(save_id, error) from error
        processes.run_on_all(lambda: self._shelf.sync(save_id), *_KINDS)
        self.verify(save_id)
        processes.run_on_all(lambda: self._settle(save_id), *_KINDS)

    def verify(self, save_id: int) -> None:
        """Check that a checkpoint is complete and readable.

        Its round state must parse, its arrays must have the names, shapes and dtypes of those
        passed to `save`, and its smallest array is read back through the store's index.

        Raises:
          CheckpointError: saying what is wrong.
        """
        processes.run_on_all(lambda: self._verify(save_id), *_KINDS)

    def _verify(self, save_id: int) -> None:
        record, found = self._read_record(save_id), self._read_specs(save_id)
        wrong = compare_arrays(record.arrays, found, "saved", "found")
        if wrong:
            raise self._unreadable(save_id, "; ".join(wrong))
        smallest = min(found, key=lambda name: math.prod(found[name][0]), default=None)
        if smallest is not None:
            shape, dtype = found[smallest]
            wanted = {smallest: np.empty(shape, jax.numpy.dtype(dtype))}
            self._refuse_changed(save_id, self._read_arrays(save_id, wanted), record.sums)

    def keep_rounds(self, rounds: Collection[int] | None) -> None:
        """Keep the checkpoints at the end of `rounds` too (None: of all), but no others longer."""
        self._shelf = dataclasses.replace(self._shelf, rounds=rounds)
        prune = functools.partial(self._shelf.prune, self._verified, damaged=False)
        processes.run_on_all(prune, *_KINDS)

    def close(self) -> None:
        """Finish the save under way and stop Orbax's threads."""
        try:
            self.finish()
        finally:
            self._checkpointer.close()

    # ------------------------------------------------------------------- reading

    def latest(self) -> int | None:
        """Return the id of the newest complete checkpoint, or None."""
        ids = self.list_ids()
        return ids[-1] if ids else None

    def find(self, save_id: int | None = None) -> int:
        """Return `save_id` (default: the newest); CheckpointError if there is no such one."""
        ids = self.list_ids()
        if save_id is None and ids:
            return ids[-1]
        if save_id not in ids:
            raise CheckpointError(
                f"{self._folder}: got checkpoint {save_id}, there are: {ids or 'none'}; choose one "
                "of them, or start the run that writes it"
            )
        return save_id

    def read_round_state(self, save_id: int | None = None) -> dict[str, Any]:
        """Return the round state of a checkpoint (default: the newest with an intact record).

        Raises:
          CheckpointError: if there is no such checkpoint, or it is unreadable.
        """
        if save_id is None:
            save_id = processes.decide_on_first(self._find_newest_whole, *_KINDS)
        chosen = self.find(save_id)
        return processes.run_on_all(lambda: dict(self._read_record(chosen).round_state), *_KINDS)

    def restore(
        self, abstract_state: Any, save_id: int | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Return `(state, round_state)` of a checkpoint (default: the newest).

        Args:
          abstract_state: the state's structure, with leaves that are arrays or
            `jax.ShapeDtypeStruct` with a sharding. The mesh may differ from that of the save.

        Raises:
          CheckpointError: if the checkpoint is missing or unreadable, or has other arrays than
            `abstract_state`. An older checkpoint is never restored in its place.
        """
        save_id = self.find(save_id)
        self.verify(save_id)
        state = self._restore_matching(save_id, abstract_state, prefix="")
        return state, self.read_round_state(save_id)

    def restore_params(self, abstract_params: Any, save_id: int | None = None) -> Any:
        """Return only `state.params` of a checkpoint (default: the newest).

        Raises:
          CheckpointError: as `restore`.
        """
        save_id = self.find(save_id)
        self.verify(save_id)
        return self._restore_matching(save_id, abstract_params, prefix="params/")

    def restore_policy(self, abstract_params: Any, save_id: int | None = None) -> Any:
        """Return the weights that are exported: the average if there is one, else the params.

        They are without the value head.

        Raises:
          CheckpointError: as `restore`.
        """
        save_id = self.find(save_id)
        self.verify(save_id)
        specs = processes.run_on_all(lambda: self._read_specs(save_id), *_KINDS)
        if not any(name.startswith("ema/") for name in specs):
            return self._restore_matching(save_id, abstract_params, prefix="params/", skip="value/")
        wide = jax.tree.map(lambda leaf: leaf.update(dtype=np.float32), abstract_params)
        average = self._restore_matching(save_id, wide, prefix="ema/")
        return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), average, abstract_params)

    def restore_newest(self, abstract_state: Any) -> tuple[Any, dict[str, Any]] | None:
        """Return `(state, round_state)` of the newest intact checkpoint, or None if there is none.

        Newer checkpoints that are damaged or missing are logged. Damaged ones are renamed, and
        deleted when the next checkpoint is complete. All arrays are read and their checksums
        verified.

        Raises:
          CheckpointError: if there were checkpoints but none is intact; or as `restore`.
        """
        gone, ids = processes.decide_on_first(
            lambda: [self._shelf.missing(), self._shelf.ids()], *_KINDS
        )
        damaged: dict[int, DamagedError] = {}
        for save_id in reversed(ids):
            try:
                processes.run_on_all(functools.partial(self._check, save_id), *_KINDS)
                found = self.restore(abstract_state, save_id)
            except DamagedError as error:
                damaged[save_id] = error
                continue
            settle = functools.partial(self._settle, save_id, gone, damaged)
            processes.run_on_all(settle, *_KINDS)
            return found
        if damaged:
            raise damaged[max(damaged)]
        if gone:
            raise CheckpointError(
                f"{self._shelf.path(gone[-1])} is missing, and no other checkpoint is left; put it "
                "back, or start a new run with --config.workdir=DIR"
            )
        return None

    def find_round_end(self, round: int) -> int | None:
        """Return the id of the newest checkpoint that was taken at the end of `round`, or None."""
        find = functools.partial(self._shelf.find_round_end, round)
        chosen: int | None = processes.decide_on_first(find, *_KINDS)
        return chosen

    def list_ids(self) -> list[int]:
        """Return the ids of all checkpoints, as process 0 sees them."""
        return list(processes.decide_on_first(self._shelf.ids, *_KINDS))

    def _find_newest_whole(self) -> int | None:
        whole = [one for one in self._shelf.ids() if not self._shelf.check(one)]
        return whole[-1] if whole else None

    def _check(self, save_id: int) -> None:
        wrong = self._shelf.check(save_id)
        if wrong:
            raise self._unreadable(save_id, wrong)

    def _settle(
        self,
        save_id: int,
        gone: Sequence[int] = (),
        damaged: Mapping[int, DamagedError] | None = None,
    ) -> None:
        """Record an intact checkpoint, and drop those that it replaces."""
        self._verified = save_id
        self._shelf.note(save_id)  # a killed process may have left it without a ledger line
        self._shelf.prune(save_id)
        self._shelf.forget(gone)
        for other, error in (damaged or {}).items():
            logger.warning("%s", error)
            self._shelf.set_aside(other)
        if damaged or (gone and gone[-1] > save_id):
            logger.warning("going on from %s instead", self._shelf.path(save_id))

    # ------------------------------------------------------------------- inside a checkpoint

    def _read_record(self, save_id: int) -> Saved:
        try:
            return saved.read_record(saved.find_record(self._folder, save_id))
        except saved.ERRORS as error:
            raise self._unreadable(save_id, f"{type(error).__name__}: {error}") from error

    def _read_specs(self, save_id: int) -> dict[str, tuple[tuple[int, ...], str]]:
        try:
            tree = self._checkpointer.metadata(self._shelf.path(save_id)).item_metadata.state.tree
            flat = traverse_util.flatten_dict(tree, sep="/")
        except Exception as error:
            raise self._unreadable(save_id, f"{type(error).__name__}: {error}") from error
        return {name: describe_array(leaf) for name, leaf in flat.items()}

    def _restore_matching(
        self, save_id: int, abstract: Any, *, prefix: str, skip: str | None = None
    ) -> Any:
        wanted = {prefix + name: leaf for name, leaf in name_arrays(abstract).items()}
        left = f"{prefix}{skip}" if skip else "\0"

        def read() -> tuple[dict[str, Any], checksums.Sums]:
            found = {
                name: spec
                for name, spec in self._read_specs(save_id).items()
                if name.startswith(prefix) and not name.startswith(left)
            }
            specs = {name: describe_array(leaf) for name, leaf in wanted.items()}
            wrong = compare_arrays(specs, found, "this run", "checkpoint")
            if wrong:
                raise failures.explain_mismatch(self._shelf.path(save_id), wrong)
            return self._read_arrays(save_id, wanted), self._read_record(save_id).sums

        arrays, sums = processes.run_on_all(read, *_KINDS)
        self._refuse_changed(save_id, arrays, sums)
        # Match arrays by name, not by the order in which Orbax returns them.
        return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])

    def _read_arrays(self, save_id: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Read the named arrays, each with the sharding of its template (numpy: on the host)."""

        def target(leaf: Any) -> ocp.RestoreArgs:
            if isinstance(leaf, np.ndarray):
                return ocp.RestoreArgs(restore_type=np.ndarray)
            return ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=True
            )

        nested = traverse_util.unflatten_dict(dict(wanted), sep="/")
        arguments = ocp.args.PyTreeRestore(
            nested, restore_args=jax.tree.map(target, nested), partial_restore=True
        )
        try:
            restored = self._reader.restore(self._shelf.path(save_id) / "state", args=arguments)
        except Exception as error:
            if failures.is_out_of_memory(error):
                raise
            raise self._unreadable(save_id, f"{type(error).__name__}: {error}") from error
        return dict(traverse_util.flatten_dict(restored, sep="/"))

    def _refuse_changed(
        self, save_id: int, arrays: Mapping[str, Any], sums: checksums.Sums
    ) -> None:
        wrong = checksums.find_wrong(arrays, sums)
        if wrong:
            listed = ", ".join(wrong[:3]) + (" ..." if len(wrong) > 3 else "")
            raise self._unreadable(save_id, f"{len(wrong)} array(s) have changed: {listed}")

    def _unreadable(self, save_id: int, reason: str) -> DamagedError:
        return failures.explain_damage(self._shelf, save_id, reason)

    def _write_failed(self, save_id: int, error: Exception) -> CheckpointError:
        return failures.explain_write(self._shelf, save_id, error, size=self._size)

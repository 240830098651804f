"""Checkpoints of a run: Orbax, asynchronous, with the round state inside the same commit.

A checkpoint is the folder `SAVE_ID` (8 digits) with two items: `state`, the train state as nested
dicts of arrays, and `round`, a JSON object with a checksum of each of their chunks (`saved.py`).
Save ids count saves, not optimizer steps: a round that trains zero steps is saved too, under a
newer id and the same step. A save is written beside and renamed, so a folder of digits alone is
complete; the rest is a leftover, removed on opening.

Older checkpoints go only when a newer one has been verified. The `keep` newest round-end ones
stay; one taken inside a stage (`round_state["in_stage"]` true) goes with the next verified one.
"""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
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

# How long processes wait for each other's part of a save; Orbax's ten minutes are short for a
# large model on network storage.
_TIMEOUT_SECONDS = 3600


# What all processes of a job raise alike where one of them fails, the worst last.
_KINDS = (DamagedError, CheckpointError, WorkdirError)


def open_checkpoints(
    folder: str | Path, *, keep: int, ledger: Ledger | None = None
) -> "Checkpoints":
    """Open `folder` (made where it is missing) and clear what killed processes left in it.

    Every process of a job calls this. The caller holds the lock of the workdir, and the ledger in
    which each checkpoint is recorded.
    """
    return Checkpoints(folder, keep=keep, ledger=ledger)


def read_checkpoints(folder: str | Path) -> "Checkpoints":
    """Open the checkpoints of a run, which may be under way, to read them: nothing is changed."""
    return Checkpoints(folder, keep=1, read_only=True)


class Checkpoints:
    """The checkpoints in one folder; made by `open_checkpoints`. All processes call all methods."""

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
        is_writer = jax.process_index() == 0 and not read_only
        self._shelf = Shelf(self._folder, keep, self._ledger, is_writer)
        processes.run_on_all(self._shelf.clear, *_KINDS)
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.PyTreeCheckpointHandler(), round=ocp.JsonCheckpointHandler()
            ),
            timeout_secs=_TIMEOUT_SECONDS,
        )
        # Reads without waiting for the other processes, of which one may fail.
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
          CheckpointError: where the write (or the one before) fails, of a full disk say.
        """
        self.finish()
        arrays = name_arrays(state)
        round_state = {**round_state, "step": int(step)}
        # Here, and not in Orbax's thread, fails what is no JSON.
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
          CheckpointError: where the save failed or cannot be read back; nothing is deleted then.
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

        Its round state must parse, its arrays must be those (names, shapes, dtypes) that were
        handed to `save`, and its smallest array is read back through the store's index.

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

    def close(self) -> None:
        """Finish the save under way and stop Orbax's threads."""
        try:
            self.finish()
        finally:
            self._checkpointer.close()

    # ------------------------------------------------------------------- reading

    def latest(self) -> int | None:
        """Return the id of the newest complete checkpoint, or None."""
        ids = self._list_ids()
        return ids[-1] if ids else None

    def find(self, save_id: int | None = None) -> int:
        """Return `save_id`, or the newest; CheckpointError, listing what there is, without it."""
        ids = self._list_ids()
        if save_id is None and ids:
            return ids[-1]
        if save_id not in ids:
            raise CheckpointError(
                f"{self._folder}: got checkpoint {save_id}, there are: {ids or 'none'}; choose one "
                "of them, or start the run that writes it"
            )
        return save_id

    def read_round_state(self, save_id: int | None = None) -> dict[str, Any]:
        """Return the round state of a checkpoint (default: the newest whose record is whole).

        Raises:
          CheckpointError: where there is no such checkpoint or it is unreadable.
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
          abstract_state: the state's structure with `jax.ShapeDtypeStruct` leaves that carry
            shardings, of any mesh: that of the save need not be the same. Arrays will do.

        Raises:
          CheckpointError: where the checkpoint is missing or unreadable (an older one is never
            taken instead without being asked for) or has other arrays than `abstract_state`.
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
        """Return what is exported of a checkpoint: its average, else the params; no value head.

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
        """Return `(state, round_state)` of the newest checkpoint that is whole; None without one.

        Newer ones that are damaged or gone are said; the former are set aside, and go when the next
        checkpoint is complete. All arrays are read, and so all their checksums checked.

        Raises:
          CheckpointError: where there was a checkpoint and none is whole, or as `restore`.
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

        def find() -> int | None:
            for save_id in reversed(self._shelf.ids()):
                state = self._read_record(save_id).round_state
                if state.get("round") == round and not state.get("in_stage"):
                    return save_id
            return None

        chosen: int | None = processes.decide_on_first(find, *_KINDS)
        return chosen

    def _list_ids(self) -> list[int]:
        """Return the ids of all checkpoints, as the first process sees them."""
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
        """Record a checkpoint that is whole, and let go of those that it stands for."""
        self._shelf.note(save_id)  # where a process was killed between its end and its line, too
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
        # The names decide which array goes where, not the order in which Orbax returns them.
        return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])

    def _read_arrays(self, save_id: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Read the named arrays, each placed as its template (numpy: on the host)."""

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

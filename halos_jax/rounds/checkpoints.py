"""Checkpoints of a run: Orbax, asynchronous, with the round state inside the same commit.

A checkpoint is the folder `SAVE_ID` (8 digits) with two items: `state`, the train state as nested
dicts of arrays, and `round`, a JSON object. Save ids count saves, not optimizer steps: a round
that trains zero steps is saved too, under a newer id and the same step. A save is written beside
and renamed, so a folder of digits alone is complete; the rest is a leftover, removed on opening.

Older checkpoints go only when a newer one has been verified. The `keep` newest round-end ones
stay; one taken inside a stage (`round_state["in_stage"]` true) goes with the next verified one.
"""

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from halos_jax import sharding, storage
from halos_jax.errors import UserError
from halos_jax.rounds.arrays import compare_arrays, describe_array, name_arrays

logger = logging.getLogger(__name__)

FORMAT = 1

# How long processes wait for each other's part of a save; Orbax's ten minutes are short for a
# large model on network storage.
_TIMEOUT_SECONDS = 3600

_SAVED = re.compile(r"\d{8}")
# A killed save, and a killed deletion: the only names besides _SAVED that are ever removed.
_LEFTOVER = re.compile(r"\d{8}\.(orbax-checkpoint-tmp.*|deleting)")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is missing, incomplete, unreadable or of another structure."""


def open_checkpoints(folder: str | Path, *, keep: int) -> "Checkpoints":
    """Open `folder` (made where it is missing) and clear what killed processes left in it.

    Every process of a job calls this. The caller holds the lock of the workdir.
    """
    return Checkpoints(folder, keep=keep)


def read_checkpoints(folder: str | Path) -> "Checkpoints":
    """Open the checkpoints of a run, which may be under way, to read them: nothing is changed."""
    return Checkpoints(folder, keep=1, read_only=True)


def find_record(folder: str | Path, save_id: int) -> Path:
    """Return the file of a checkpoint with its round state and what its arrays are."""
    return Path(folder) / f"{save_id:08d}" / "round" / "metadata"


class Checkpoints:
    """The checkpoints in one folder; made by `open_checkpoints`. All processes call all methods."""

    def __init__(self, folder: str | Path, *, keep: int, read_only: bool = False) -> None:
        if keep < 1:
            raise ValueError(f"checkpoint.keep: got {keep}, allowed: 1 or more")
        self._folder = Path(folder).absolute()
        self._keep = keep
        self._pending: int | None = None
        self._is_writer = jax.process_index() == 0 and not read_only
        if self._is_writer:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.iterdir():
                if _LEFTOVER.fullmatch(path.name) and not path.is_symlink():
                    shutil.rmtree(path)
        sharding.wait_for_all("open checkpoints")
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.PyTreeCheckpointHandler(), round=ocp.JsonCheckpointHandler()
            ),
            timeout_secs=_TIMEOUT_SECONDS,
        )
        ids = self._ids()
        self._next = ids[-1] + 1 if ids else 1
        if len(ids) > 1 and not read_only:
            self._finish_interrupted_pruning(ids[-1])
        sharding.wait_for_all("prune checkpoints")

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
        record = {
            "format": FORMAT,
            "round_state": {**round_state, "step": int(step)},
            "arrays": {name: describe_array(leaf) for name, leaf in arrays.items()},
        }
        json.dumps(record, allow_nan=False)  # fail here, not in Orbax's thread
        self._size = sum(leaf.nbytes for leaf in arrays.values())
        save_id, self._next = self._next, self._next + 1
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(traverse_util.unflatten_dict(arrays, sep="/")),
            round=ocp.args.JsonSave(record),
        )
        try:
            self._checkpointer.save(self._path(save_id), args=arguments)
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
        if self._is_writer:
            _sync_tree(self._path(save_id))
        self.verify(save_id)
        sharding.wait_for_all("verify checkpoint")
        self._prune(save_id)

    def verify(self, save_id: int) -> None:
        """Check that a checkpoint is complete and readable.

        Its round state must parse, its arrays must be those (names, shapes, dtypes) that were
        handed to `save`, and its smallest array is read back through the store's index.

        Raises:
          CheckpointError: saying what is wrong.
        """
        record = self._read_record(save_id)
        found = self._read_specs(save_id)
        wrong = compare_arrays(record["arrays"], found, "saved", "found")
        if wrong:
            raise self._unreadable(save_id, "; ".join(wrong))
        smallest = min(found, key=lambda name: math.prod(found[name][0]), default=None)
        if smallest is not None:
            shape, dtype = found[smallest]
            self._read_arrays(save_id, {smallest: np.empty(shape, jax.numpy.dtype(dtype))})

    def close(self) -> None:
        """Finish the save under way and stop Orbax's threads."""
        try:
            self.finish()
        finally:
            self._checkpointer.close()

    # ------------------------------------------------------------------- reading

    def latest(self) -> int | None:
        """Return the id of the newest complete checkpoint, or None."""
        ids = self._ids()
        return ids[-1] if ids else None

    def find(self, save_id: int | None = None) -> int:
        """Return `save_id`, or the newest; CheckpointError, listing what there is, without it."""
        ids = self._ids()
        if save_id is None and ids:
            return ids[-1]
        if save_id not in ids:
            raise CheckpointError(
                f"{self._folder}: got checkpoint {save_id}, there are: {ids or 'none'}; choose one "
                "of them, or start the run that writes it"
            )
        return save_id

    def read_round_state(self, save_id: int | None = None) -> dict[str, Any]:
        """Return the round state of a checkpoint (default: the newest) without reading arrays.

        Raises:
          CheckpointError: where there is no such checkpoint or it is unreadable.
        """
        return self._read_record(self.find(save_id))["round_state"]

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
        return state, self._read_record(save_id)["round_state"]

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
        if not any(name.startswith("ema/") for name in self._read_specs(save_id)):
            return self._restore_matching(save_id, abstract_params, prefix="params/", skip="value/")
        wide = jax.tree.map(lambda leaf: leaf.update(dtype=np.float32), abstract_params)
        average = self._restore_matching(save_id, wide, prefix="ema/")
        return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), average, abstract_params)

    def find_round_end(self, round: int) -> int | None:
        """Return the id of the newest checkpoint that was taken at the end of `round`, or None."""
        for save_id in reversed(self._ids()):
            state = self.read_round_state(save_id)
            if state.get("round") == round and not state.get("in_stage"):
                return save_id
        return None

    # ------------------------------------------------------------------- retention
    def _prune(self, verified: int) -> None:
        if not self._is_writer:
            return
        older = [save_id for save_id in self._ids() if save_id < verified]
        ends = [save_id for save_id in older if not self._is_in_stage(save_id)]
        newest_is_end = not self._is_in_stage(verified)
        kept = set(ends[max(len(ends) - self._keep + newest_is_end, 0) :])
        for save_id in older:
            if save_id not in kept:
                # Renamed first: a deletion that is cut short leaves nothing that looks complete.
                doomed = self._path(save_id).rename(self._folder / f"{save_id:08d}.deleting")
                shutil.rmtree(doomed)

    def _is_in_stage(self, save_id: int) -> bool:
        try:
            return bool(self._read_record(save_id)["round_state"].get("in_stage"))
        except CheckpointError:
            return False  # unreadable: keep it as long as any round-end checkpoint

    def _finish_interrupted_pruning(self, newest: int) -> None:
        # A process killed between a save and its pruning leaves the replaced checkpoints behind.
        try:
            self.verify(newest)
        except CheckpointError as error:
            logger.warning("kept all checkpoints: %s", error)
            return
        self._prune(newest)

    # ------------------------------------------------------------------- inside a checkpoint

    def _path(self, save_id: int) -> Path:
        return self._folder / f"{save_id:08d}"

    def _ids(self) -> list[int]:
        paths = self._folder.iterdir() if self._folder.is_dir() else ()
        return sorted(
            int(path.name)
            for path in paths
            if _SAVED.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        )

    def _read_record(self, save_id: int) -> dict[str, Any]:
        # Plain JSON, read without Orbax, which would look at the arrays' metadata too.
        path = find_record(self._folder, save_id)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise ValueError(f"its format is {record['format']}, this program reads {FORMAT}")
            if not isinstance(record["round_state"], dict):
                raise ValueError("its round state is not a JSON object")
            record["arrays"] = {
                name: (tuple(shape), dtype)
                for name, (shape, dtype) in dict(record["arrays"]).items()
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(save_id, f"{type(error).__name__}: {error}") from error
        return record

    def _read_specs(self, save_id: int) -> dict[str, tuple[tuple[int, ...], str]]:
        try:
            tree = self._checkpointer.metadata(self._path(save_id)).item_metadata.state.tree
            flat = traverse_util.flatten_dict(tree, sep="/")
        except Exception as error:
            raise self._unreadable(save_id, f"{type(error).__name__}: {error}") from error
        return {name: describe_array(leaf) for name, leaf in flat.items()}

    def _restore_matching(
        self, save_id: int, abstract: Any, *, prefix: str, skip: str | None = None
    ) -> Any:
        wanted = {prefix + name: leaf for name, leaf in name_arrays(abstract).items()}
        saved = self._read_specs(save_id)
        left = f"{prefix}{skip}" if skip else "\0"
        found = {
            name: spec
            for name, spec in saved.items()
            if name.startswith(prefix) and not name.startswith(left)
        }
        specs = {name: describe_array(leaf) for name, leaf in wanted.items()}
        wrong = compare_arrays(specs, found, "this run", "checkpoint")
        if wrong:
            raise CheckpointError(
                f"{self._path(save_id)} does not fit this run: {len(wrong)} array(s) differ:\n"
                + "\n".join(f"  - {line}" for line in wrong)
                + "\nuse the model and optimizer that wrote it, or another workdir"
            )
        arrays = self._read_arrays(save_id, wanted)
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
            restored = self._checkpointer.restore(
                self._path(save_id), args=ocp.args.Composite(state=arguments)
            )
        except Exception as error:
            raise self._unreadable(save_id, f"{type(error).__name__}: {error}") from error
        return traverse_util.flatten_dict(restored.state, sep="/")

    def _unreadable(self, save_id: int, reason: str) -> CheckpointError:
        others = [other for other in self._ids() if other != save_id]
        then = f"the run then goes on from {others[-1]:08d}" if others else "no other one is left"
        return CheckpointError(
            f"{self._path(save_id)} is incomplete or corrupt ({_shorten(reason)}); restore the "
            f"folder, or delete it and run the same command again ({then})"
        )

    def _write_failed(self, save_id: int, error: Exception) -> CheckpointError:
        if storage.says_full(error):
            kept = f"checkpoint {self._ids()[-1]:08d}" if self._ids() else "what is done"
            return CheckpointError(storage.describe_full(self._folder, self._size, kept))
        reason = _shorten(f"{type(error).__name__}: {error}")
        return CheckpointError(
            f"{self._path(save_id)} could not be written ({reason}); "
            "the checkpoints before it are kept; check the disk and run the same command again"
        )


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    # The reason stands at the end, behind paths that may be long.
    return text if len(text) <= 400 else f"{text[:100]} ... {text[-300:]}"


def _sync_tree(folder: Path) -> None:
    # Against loss of power; Orbax syncs the array files but not the names and the JSON.
    paths: Iterable[Path] = [*folder.rglob("*"), folder, folder.parent]
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Optimizer steps taken again from a state that is still there, up to the next checkpoint."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from halos_jax.audit.findings import Finding, differs, not_checked, passed
from halos_jax.audit.rederive.compare import (
    Amount,
    Difference,
    Tolerance,
    compare_rows,
    drop_shares,
    judge,
    say_within,
)
from halos_jax.audit.rederive.replica import Replica
from halos_jax.audit.rederive.rewards import check_metrics, link
from halos_jax.audit.rederive.same import explain_programs
from halos_jax.checkpoints import checksums, saved
from halos_jax.checkpoints.arrays import name_arrays
from halos_jax.checkpoints.saved import Saved
from halos_jax.metrics import MetricWriter, is_time, read_metrics
from halos_jax.rounds import stages
from halos_jax.rounds.context import Run, StageResult
from halos_jax.rounds.replay.choose import FILE as REPLAY
from halos_jax.rounds.watch import before
from halos_jax.training import loop as training
from halos_jax.training.loop import Dataset, Trainer
from halos_jax.types import Params, TrainState
from halos_jax.workdir.manifests import Manifest

logger = logging.getLogger(__name__)

# Of the metrics of a step, such as its loss: other devices add up in another order.
_CLOSE = {"float32": Tolerance(1e-3, 1e-4), "bfloat16": Tolerance(0.1, 0.02)}
# How far the params may be from the recorded ones, as a share of how far the round moved them.
_MOST_APART = {"float32": 0.05, "bfloat16": 0.5}


FILE = "metrics.jsonl"


class _Enough(Exception):
    """Stops the steps after those that are wanted."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What came of taking steps again.

    Attributes:
      state: that after the last step; None if not all steps of the round were taken.
      steps: how many steps were taken, of `total` of the round.
      signs: what was measured on the round's samples before the first step.
    """

    state: TrainState | None
    steps: int
    total: int
    signs: StageResult


def find_close(compute_dtype: str) -> Tolerance:
    """Return how far the metrics of a step may be from those on other devices."""
    return _CLOSE[compute_dtype]


def train_again(
    replica: Replica,
    run: Run,
    state: TrainState,
    manifest: Manifest,
    held_out: Dataset | None,
    most: int | None,
) -> Trained:
    """Take the steps of a round again, at most `most` of them, and write their metrics.

    Args:
      state: the one that the round began with; its buffers are taken over.
      held_out: what the run evaluated while it trained.
      most: None: all steps of the round.
    """
    round, first = manifest.round, int(state.step)
    folder = replica.make_folder(f"train-{round}")
    recorded = replica.folder(round)
    names = ["manifest.json", "samples.jsonl", "scores.jsonl", "feedback.jsonl"]
    names += [REPLAY] if REPLAY in manifest.files else []
    link(folder, *(recorded / name for name in names))
    items = stages.load_feedback_items(run, folder)
    held = [state.params]
    dataset = stages.prepare_round(
        run, items, folder, round, lambda: replica.load_sft(run), lambda: held[0]
    )
    held.clear()
    signs = before.read_before(folder)
    total = 0 if dataset is None else len(dataset.plan)
    if dataset is None or most == 0:
        return Trained(state if not total else None, 0, total, signs)
    writer = MetricWriter(folder / FILE)
    after, taken = take_steps(run.trainer, state, dataset, held_out, writer, first=first, most=most)
    return Trained(after if taken == total else None, taken, total, signs)


def take_steps(
    trainer: Trainer,
    state: TrainState,
    dataset: Dataset,
    held_out: Dataset | None,
    writer: MetricWriter,
    *,
    first: int,
    most: int | None,
) -> tuple[TrainState, int]:
    """Train over `dataset` from its beginning; return the state and how many steps were taken.

    Args:
      first: optimizer steps that the run took before.
      most: steps to take at most; None: all.
    """
    reached: list[tuple[TrainState, int]] = []

    def note(after: TrainState, done: int) -> None:
        if most is not None and done >= most:
            reached.append((after, done))
            raise _Enough

    try:
        after = training.run_steps(
            trainer,
            state,
            dataset,
            held_out=held_out,
            writer=writer,
            first_step=first,
            on_step=note,
            label="verify",
        )
        reached.append((after, len(dataset.plan)))
    except _Enough:
        pass
    writer.close()
    return reached[0]


# --------------------------------------------------------------------------- comparisons


def check_steps(
    recorded: Path, folder: Path, trained: Trained, close: Tolerance, *, first: int, is_same: bool
) -> Finding:
    """Compare the metrics of steps that were taken again with those in metrics.jsonl.

    Args:
      recorded: the run's metrics.jsonl.
      folder: where `train_again` has put its own.
      first: optimizer steps that the run took before.
    """
    name, what = "steps", "loss, gradient norm and all else of steps taken again"
    last = first + trained.steps
    known = _list_steps(recorded, first, last)
    made = _list_steps(folder / FILE, first, last)
    amount = Amount(trained.steps, trained.total, "steps")
    if not trained.total:
        return passed(name, "the round has nothing to train on", 0, 0, "steps")
    pairs = [(known.get(key), row) for key, row in made.items()]
    missing = [int(row["step"]) for one, row in pairs if one is None and "loss/train" in row]
    if missing:
        why = f"metrics.jsonl has no metrics of step {missing[0]} under these names"
        return differs(name, what, why, *dataclasses.astuple(amount))
    both = [(one, row) for one, row in pairs if one is not None]
    rows, again = [one for one, _ in both], [row for _, row in both]
    return judge(
        name,
        what,
        _name_steps(compare_rows(rows, again), again),
        _name_steps(
            compare_rows([*map(drop_shares, rows)], [*map(drop_shares, again)], close), again
        ),
        is_same=is_same,
        amount=amount,
    )


_Key = tuple[int, frozenset[str]]


def _list_steps(path: Path, first: int, last: int) -> dict[_Key, dict[str, float]]:
    """Return the records of the steps after `first` up to `last`, without what depends on time."""
    found = {}
    for record in read_metrics(path) if path.exists() else ():
        row = {name: value for name, value in record.items() if not is_time(name)}
        is_first = first == record["step"] == 0 and "loss/eval" in row
        if "round" not in row and (first < record["step"] <= last or is_first):
            found[int(record["step"]), frozenset(row)] = row
    return found


def _name_steps(difference: Difference, rows: Sequence[Mapping[str, float]]) -> Difference:
    """Return a difference that names the step in the place of the line."""
    head, _, rest = difference.first.partition(" ")
    number, _, rest = rest.partition(" ")
    if head != "line" or not number.isdigit():
        return difference
    step = int(rows[int(number) - 1]["step"])
    return dataclasses.replace(difference, first=f"step {step} {rest}")


@dataclasses.dataclass(frozen=True)
class Kept:
    """A checkpoint to compare with: its number, its record, and the params around it.

    `load` returns its own params, `load_begin` those before the steps; None: they are gone.
    """

    save_id: int
    record: Saved
    load: Callable[[], Params]
    load_begin: Callable[[], Params | None]


def check_state(state: TrainState, kept: Kept | None, dtype: str, *, is_same: bool) -> Finding:
    """Compare the state after steps that were taken again with the checkpoint at their end.

    Args:
      kept: None: the checkpoint is deleted.
      dtype: the compute dtype, for the tolerance of other devices.
    """
    name, what, counts = "checkpoints", "params and optimizer, after the steps", (1, 1, "states")
    if kept is None:
        return not_checked(name, what, "the checkpoint is deleted (checkpoint.keep)", *counts[1:])
    arrays, record = name_arrays(state), kept.record
    lacking = sorted(arrays.keys() ^ record.arrays.keys())
    if lacking:
        return differs(name, what, f"other arrays: {', '.join(lacking[:3])}", *counts)
    wrong = checksums.find_wrong(arrays, record.sums)
    if not wrong and record.sums.keys() == arrays.keys():
        return passed(name, what, *counts, why=f"{kept.save_id:08d}, {len(arrays)} arrays")
    reason = explain_programs() if is_same else ""
    if is_same and not reason:
        listed = ", ".join(wrong[:3]) + (" ..." if len(wrong) > 3 else "")
        why = f"{len(wrong)} of {len(arrays)} arrays are others: {listed}"
        return differs(name, what, why, *counts)
    begin = kept.load_begin()
    if begin is None:
        return not_checked(name, what, "the state before the steps is gone", *counts[1:])
    apart, most = measure_apart(state.params, kept.load(), begin), _MOST_APART[dtype]
    said = f"the params are apart by {apart:.3g} of their way in these steps, at most {most:g}"
    if apart > most:
        return differs(name, what, said, *counts)
    return passed(name, what, *counts, why=say_within(said, reason))


def find_kept(replica: Replica, run: Run, round: int, begin: Params | None) -> Kept | None:
    """Return the checkpoint at the end of a round; None if it is deleted.

    `begin` are the params before the round's steps, if they were kept; None: as `load_begin`.
    """
    save_id = replica.find_checkpoint(round)
    if save_id is None:
        return None
    record = saved.read_record(saved.find_record(replica.workdir / "checkpoints", save_id))
    return Kept(
        save_id,
        record,
        lambda: replica.load_params(run, save_id),
        lambda: _load_begin(replica, run, round) if begin is None else begin,
    )


def _load_begin(replica: Replica, run: Run, round: int) -> Params | None:
    layouts = run.trainer.layouts.to_record()
    state = replica.load_begin(run, round)
    run.trainer.layouts.load(layouts)
    return None if state is None else state.params


def measure_apart(found: Params, recorded: Params, begin: Params) -> float:
    """Return the distance of two params, as a share of how far `recorded` is from `begin`."""
    leaves = [jax.tree.leaves(params) for params in (found, recorded, begin)]
    apart = moved = 0.0
    for one, other, start in zip(*leaves, strict=True):
        values = [np.asarray(leaf, np.float64) for leaf in (one, other, start)]
        apart += float(np.sum((values[0] - values[1]) ** 2))
        moved += float(np.sum((values[1] - values[2]) ** 2))
    if not moved:
        return 0.0 if not apart else float("inf")
    return float(np.sqrt(apart / moved))


def check_signs(
    manifest: Manifest, signs: StageResult, close: Tolerance, *, is_same: bool
) -> Finding:
    """Compare the signs of a round's fresh samples with those in its manifest."""
    return check_metrics("signs", manifest, signs, close, is_same=is_same)

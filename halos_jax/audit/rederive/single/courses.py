"""The tasks that train once: their first steps taken again, or all of them and the checkpoint."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import jax

from halos_jax.audit.findings import Finding, not_checked
from halos_jax.audit.opened import Opened
from halos_jax.audit.rederive import settings, steps
from halos_jax.audit.rederive.attempts import attempt, hush
from halos_jax.audit.rederive.single.jobs import open_copy
from halos_jax.audit.rederive.steps import FILE, Kept, Trained
from halos_jax.checkpoints import saved
from halos_jax.checkpoints.position import Position
from halos_jax.checkpoints.store import Checkpoints, read_checkpoints
from halos_jax.metrics import MetricWriter, read_metrics
from halos_jax.policies import source
from halos_jax.policies.policy import load_start
from halos_jax.rounds.context import NOTHING
from halos_jax.tasks.train import Course, complete_course, make_course, plan_course
from halos_jax.training import loop as training
from halos_jax.types import Params, TrainState
from halos_jax.workdir import execution
from halos_jax.workdir.changes import History
from halos_jax.workdir.workspace import Workspace


def check_course(opened: Opened) -> list[Finding]:
    """Take steps of a task's training again, as far as `config.verify` says."""
    depth = opened.given.verify
    if not (depth.steps or depth.replay):
        return []
    if not (opened.workdir / FILE).exists():
        return [not_checked("steps", "taken again", "no step has been taken yet")]
    workspace = _make_workspace(opened)
    with jax.set_mesh(workspace.mesh), hush():
        return attempt("steps", lambda: _check_steps(opened, workspace))


def _make_workspace(opened: Opened) -> Workspace:
    """Return a workspace with the config with which the run was started."""
    workspace, start = open_copy(opened), (0, 0)
    config = settings.undo_changes(workspace.config, opened.history.segments, start)
    config = source.use_final(dataclasses.replace(config, mesh=workspace.config.mesh))
    history = History(config, (), settings.list_before(opened.history.segments, start))
    return dataclasses.replace(
        workspace, config=config, info=dataclasses.replace(workspace.info, history=history)
    )


def _check_steps(opened: Opened, workspace: Workspace) -> Iterator[Finding]:
    depth = opened.given.verify
    course = make_course(workspace)
    checkpoints = read_checkpoints(opened.workdir / "checkpoints")
    opened.closing.callback(checkpoints.close)
    state = _start(course, checkpoints)
    dataset = plan_course(course)
    dataset, held_out = complete_course(course, dataset, state, checkpoints)
    most = None if depth.replay or depth.steps < 0 else depth.steps
    end = settings.find_break(opened.history.segments, (0, 0))
    if end is not None:
        most = end if most is None else min(most, end)
    taken = _count_taken(opened.workdir / FILE)
    most = taken if most is None or most > taken else most
    writer = MetricWriter(workspace.workdir / FILE)
    after, count = steps.take_steps(
        course.trainer, state, dataset, held_out, writer, first=0, most=most
    )
    trained = Trained(None, count, max(len(dataset.plan), count), NOTHING)
    is_same, dtype = is_same_throughout(opened.workdir, workspace), workspace.config.model
    close = steps.find_close(dtype.compute_dtype)
    yield steps.check_steps(
        opened.workdir / FILE, workspace.workdir, trained, close, first=0, is_same=is_same
    )
    kept = _find_kept(opened.workdir, checkpoints, course, count)
    if kept is not None or count == len(dataset.plan):
        yield steps.check_state(after, kept, dtype.compute_dtype, is_same=is_same)


def _start(course: Course, checkpoints: Checkpoints) -> TrainState:
    """Return the state that the run started with: of a branch, its first checkpoint."""
    first = checkpoints.find_round_end(0)
    if first is not None:
        restored, record = checkpoints.restore(course.trainer.abstract_state, first)
        course.trainer.layouts.load(Position.from_dict(record).layouts)
        state: TrainState = restored
        return state
    return training.start_state(course.trainer, _load_start(course))


def _load_start(course: Course) -> Params:
    return load_start(course.policy, course.trainer.mesh, course.trainer.frozen)


def _count_taken(path: Path) -> int:
    """Return how many steps a run has recorded."""
    found = [one["step"] for one in read_metrics(path) if "loss/train" in one]
    return int(max(found, default=0))


def is_same_throughout(workdir: Path, workspace: Workspace) -> bool:
    """Tell whether all that a run without manifests computed must come out the same to the bit."""
    starts = execution.read_starts(workdir)
    now = execution.describe_execution(workspace.config, workspace.mesh)
    return bool(starts) and all(
        execution.are_equal_to_the_bit(one.execution, now) for one in starts
    )


def _find_kept(workdir: Path, checkpoints: Checkpoints, course: Course, step: int) -> Kept | None:
    """Return the checkpoint after `step` steps, if there is one."""
    abstract = course.trainer.abstract_state.params
    for save_id in checkpoints.list_ids():
        if Position.from_dict(checkpoints.read_round_state(save_id)).step == step:
            return Kept(
                save_id,
                saved.read_record(saved.find_record(workdir / "checkpoints", save_id)),
                functools.partial(checkpoints.restore_params, abstract, save_id),
                lambda: training.add_value_head(course.trainer, _load_start(course)),
            )
    return None

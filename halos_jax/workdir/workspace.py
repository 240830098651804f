"""The open workdir of a task: its config, its files, its devices and its signal to stop."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from halos_jax import sharding, storage
from halos_jax.config import Config
from halos_jax.metrics import MetricWriter
from halos_jax.once import take_repeats
from halos_jax.trackers.follower import Follower
from halos_jax.trackers.registry import open_trackers
from halos_jax.workdir import execution, runs
from halos_jax.workdir.changes import History, record_changes
from halos_jax.workdir.interrupt import StopSignal
from halos_jax.workdir.journal import keep_journal
from halos_jax.workdir.ledger import Ledger
from halos_jax.workdir.manifests import Manifest
from halos_jax.workdir.runs import RunInfo
from halos_jax.workdir.seals.chain import METRICS

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Workspace:
    """What every task works with; made by `open_workspace`, which also closes it.

    Attributes:
      config: that of this start. A task may replace paths to workdirs by those of their models.
      info: the locked workdir, with the history of its configs.
      mesh: all devices of the job; it is the current mesh while the workspace is open.
      stop: tells whether the run was asked to stop.
      closers: what is called when the workspace is closed, even by an error.
    """

    config: Config
    info: RunInfo
    mesh: Mesh
    stop: StopSignal
    closers: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    @property
    def workdir(self) -> Path:
        """The folder that the task writes to."""
        return self.info.workdir

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files: process 0 of the job does."""
        return self.info.is_writer

    @property
    def ledger(self) -> Ledger:
        """The ledger of all files in the workdir."""
        return self.info.ledger

    @property
    def history(self) -> History:
        """The configs that the run was started with, this one included."""
        return self.info.history

    def with_config(self, config: Config) -> "Workspace":
        """Return the same workspace with another config."""
        return dataclasses.replace(self, config=config)

    def plan_segment(self, *, grown: Mapping[str, Any] | None = None, **where: Any) -> History:
        """Return the history as `begin_segment`, called with the same arguments, will make it."""
        return record_changes(self.history, grown or {}, **where)

    def begin_segment(self, *, grown: Mapping[str, Any] | None = None, **where: Any) -> None:
        """Record what has changed in the config since the last start; see `runs`."""
        runs.begin_segment(self.info, grown=grown, **where)

    def begin_execution(self, trained: tuple[int, int] = (0, 0)) -> None:
        """Record what the run is executed on, before its first stage of this start.

        `trained` is how many rounds the newest checkpoint has trained, and steps of the next one.
        """
        self.info.executions = execution.begin_execution(
            self.ledger, self.config, self.mesh, trained
        )

    def name_execution(self, manifest: Manifest, stage: str) -> dict[str, Any]:
        """Return the fields of a manifest that say how a stage, done now, was executed."""
        return execution.make_updates(self.info.executions, manifest, stage)

    def open_metrics(self, resume_step: int) -> MetricWriter:
        """Open `metrics.jsonl`, and trackers, for a run that goes on after `resume_step`."""
        return MetricWriter(
            self.workdir / METRICS if self.is_writer else None,
            console=self.is_writer,
            resume_step=resume_step,
            note=self.ledger.note_prefix,
            sinks=self._open_trackers(),
        )

    def update_trackers(self) -> None:
        """Give the trackers of a complete run what they lack of its metrics."""
        for tracker in self._open_trackers():
            tracker.resume(None)

    def _open_trackers(self) -> list[Follower]:
        """Return the trackers of this process, which are closed together with the workspace."""
        path = self.workdir / METRICS
        trackers = open_trackers(self.config, path) if self.is_writer else []
        for tracker in trackers:
            self.closers.callback(tracker.close)
        return trackers


@contextlib.contextmanager
def open_workspace(config: Config, stop: StopSignal) -> Iterator[Workspace]:
    """Open `config.workdir` for a new or resumed run, and make its mesh the current one.

    Every process of the job calls this. The workdir is locked until the block ends.

    Raises:
      WorkdirError: as `runs.open_run`, or for a file system error inside the block.
    """
    info = runs.join_run(config)
    try:
        mesh = sharding.make_mesh(config.mesh)
        kept = keep_journal(info.workdir, is_new=not info.is_resumed, is_writer=info.is_writer)
        with (
            storage.explain_run_errors(info.workdir),
            kept,
            jax.set_mesh(mesh),
            contextlib.ExitStack() as closers,
        ):
            closers.callback(_report_repeats)
            yield Workspace(info.config, info, mesh, stop, closers)
    finally:
        info.close()


def _report_repeats() -> None:
    """Log how often what was said once came again; called while the journal is still kept."""
    for level, line in take_repeats():
        logger.log(level, "%s", line)

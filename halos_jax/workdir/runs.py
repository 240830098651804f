"""An open run: its workdir, created or resumed, locked, and with the history of its configs."""

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos_jax import config as config_lib
from halos_jax import processes, sharding, storage
from halos_jax.config.tasks import TASKS, Task
from halos_jax.trackers.registry import FOLDER as TRACKERS
from halos_jax.workdir import changes, execution, intact, journal
from halos_jax.workdir import ledger as ledgers
from halos_jax.workdir.changes import History
from halos_jax.workdir.execution import Executions
from halos_jax.workdir.ledger import Ledger
from halos_jax.workdir.lock import lock_workdir

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class RunInfo:
    """An open run. Its lock is released by `close()` or when the process ends, however it ends.

    `executions` are known once the run has begun to work (`Workspace.begin_segment`).
    """

    workdir: Path
    is_resumed: bool
    is_writer: bool
    history: History
    ledger: Ledger
    executions: Executions = Executions()
    _lock: int | None = None

    @property
    def config(self) -> config_lib.Config:
        """The config to run with: that of this start; see `History`."""
        return self.history.config

    def close(self) -> None:
        """Release the workdir for other jobs."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def open_run(workdir: str | Path, config: config_lib.Config, *, is_writer: bool = True) -> RunInfo:
    """Create or resume the run in `workdir`, and lock it against other jobs.

    Every process of a job calls this, process 0 with `is_writer` (and first, if the workdir may be
    new). The caller must keep the result, since closing it releases the lock. If the run has not
    produced anything yet (it failed because of its config, say), any config is accepted.

    Raises:
      WorkdirError: if the folder cannot be written, another job uses it, `config` differs from that
        of the run in a field that may not change, or a file is not as the run left it.
    """
    workdir = Path(workdir)
    path = workdir / "config.json"
    lock = None
    try:
        with storage.explain_os_errors(workdir):
            if is_writer:
                workdir.mkdir(parents=True, exist_ok=True)
                lock = lock_workdir(workdir)
                storage.remove_partials(workdir)
            ledger = ledgers.open_ledger(workdir) if is_writer else ledgers.read_ledger(workdir)
            is_resumed = path.exists()
            history = History(config)
            if is_resumed and not (is_writer and _is_untouched(workdir)):
                history = changes.read_history(workdir, config)
                changes.refuse_changes(workdir, history)
                if is_writer:
                    intact.open_workdir(workdir, ledger, remade=_find_remade(config.task))
            elif is_writer:
                intact.check_workdir(workdir, ledger)
                is_resumed = False
                for name in (intact.PROMPTS, execution.FILE):  # prompts, seed, settings may differ
                    ledger.note_gone(workdir / name)
                    (workdir / name).unlink(missing_ok=True)
                changes.write_history(workdir, history, note=ledger.note_file)
    except BaseException:
        if lock is not None:
            os.close(lock)
        raise
    return RunInfo(workdir, is_resumed, is_writer, history, ledger, _lock=lock)


def refuse_other(config: config_lib.Config) -> None:
    """Raise WorkdirError if `config.workdir` holds a run that may not be resumed with `config`."""
    workdir = Path(config.workdir)
    if (workdir / changes.FILE).exists() and not _is_untouched(workdir):
        changes.refuse_changes(workdir, changes.read_history(workdir, config))


def find_begun(config: config_lib.Config) -> config_lib.Config:
    """Return the config with which the run in `config.workdir` goes on; `config` for a new one.

    Raises:
      WorkdirError: if the workdir has a config.json that no run has written.
    """
    workdir = Path(config.workdir)
    if not (workdir / changes.FILE).exists() or _is_untouched(workdir):
        return config
    return changes.read_history(workdir, config).config


def join_run(config: config_lib.Config) -> RunInfo:
    """Open the run of `config.workdir` on every process of the job, on process 0 first.

    Raises:
      WorkdirError: as `open_run`; the other processes raise an OtherProcessError.
    """
    info = processes.run_on_first(lambda: open_run(config.workdir, config))

    def join() -> RunInfo:
        return info or open_run(config.workdir, config, is_writer=False)

    return processes.run_on_all(join, storage.WorkdirError)


def _find_remade(task: Task) -> tuple[str, ...]:
    """Return the folders of a workdir that a task makes again if they are damaged."""
    return TASKS[task].remakes


def begin_segment(info: RunInfo, *, grown: Mapping[str, Any] | None = None, **where: Any) -> None:
    """Record and log what has changed in the config since the last start.

    Every process of the job calls this, once it knows `where` in the run the changes take effect:
    the `round` and the `step`. From then on they are part of the run's config. `grown` is what else
    has grown, such as the data, as path -> [before, after].
    """
    sharding.wait_for_all("begin a segment")  # all must have read the previous config
    for line in changes.describe_changes(info.history):
        logger.info("%s", line)
    kept = changes.describe_kept(info.history, intact.list_shards(info.workdir))
    if kept:
        logger.info("%s", kept)
    _replace_history(info, changes.record_changes(info.history, grown or {}, **where))


def is_complete(info: RunInfo) -> bool:
    """Tell whether the run has exported its result and has not been extended since."""
    return not info.history.has_more and intact.is_complete(info.workdir, info.ledger)


def end_segments(info: RunInfo) -> None:
    """Record that the run, with all its extensions, is done and exported."""
    _replace_history(info, changes.close_segments(info.history))


def _replace_history(info: RunInfo, history: History) -> None:
    before, info.history = info.history, history

    def write() -> None:
        if before != history:
            changes.write_history(info.workdir, history, note=info.ledger.note_file)

    # By all, whatever has changed: processes that were started with different settings would else
    # wait for each other in different places.
    processes.run_on_first(write)


def _is_untouched(workdir: Path) -> bool:
    """Tell whether a run has written only its config: no file of a stage, no checkpoint."""
    ours = (
        "config.json",
        ".lock",
        "compilation_cache",
        ledgers.FILE,
        execution.FILE,
        intact.INPUTS,
        intact.PROMPTS,
        intact.PAGE,
        intact.COMPARISON,
        intact.FINDINGS,
        journal.FILE,
        TRACKERS,
    )
    others = [path for path in workdir.iterdir() if path.name not in ours]
    is_run = changes.is_run(changes.read_plain(workdir / changes.FILE))
    return is_run and not any(path.is_file() or any(path.iterdir()) for path in others)

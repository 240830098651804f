"""A run as a state machine on disk: the workdir, its lock, and a manifest per round.

    workdir/config.json                       the run's configuration; a resume must agree with it
    workdir/.lock                             held while a job runs
    workdir/ledger.jsonl                      the hash of every other file
    workdir/rounds/0003/samples.jsonl ...     the output of each stage
    workdir/rounds/0003/manifest.json         the stages that are done, and the files' hashes

A stage writes each file under a temporary name (`NAME.partial`), syncs and renames it, and then
replaces the manifest. A stage that the manifest does not name counts as not done. Only process 0 of
a job writes.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos_jax import config as config_lib
from halos_jax import processes, sharding, storage
from halos_jax.config.tasks import TASKS, Task
from halos_jax.errors import UserError
from halos_jax.workdir import changes, intact
from halos_jax.workdir import ledger as ledgers
from halos_jax.workdir.changes import History
from halos_jax.workdir.intact import MANIFEST
from halos_jax.workdir.ledger import Ledger
from halos_jax.workdir.lock import lock_workdir

logger = logging.getLogger(__name__)

STAGES = TASKS["online"].stages
VERSION = 2
_READABLE = (1, 2)  # 1: the run has no ledger; otherwise the same as 2


class ManifestError(UserError, ValueError):
    """A round's manifest, or a file that it names, is not what the run wrote."""


@dataclasses.dataclass(frozen=True, slots=True)
class FileRecord:
    """The identity of a stage's output file: hex SHA-256 of its bytes, number of records."""

    sha256: str
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """The record of one round.

    `stages` are those that are done, in order. `start` and `stop` are the round's range of the
    fixed prompt order, and `prompts` is the hash of the prompts in it (in round 0, of the held-out
    prompts). `policy` and `reference` name the model that was sampled from and the reference.
    `metrics` are counts and means for people. `decisions` are what the run has chosen by itself in
    this round, under the name of what chose it; a resume reads them and does not choose again.
    `layouts` holds the shapes of the reward model's
    batches (`LayoutMemory.to_record`) at the end of the last stage. `segments` are those of
    config.json that began in this round: what changed in the config, the devices or the data, and
    from which step on.
    """

    round: int
    seed: int = 0
    start: int = 0
    stop: int = 0
    prompts: str = ""
    policy: str = ""
    reference: str = ""
    stages: tuple[str, ...] = ()
    files: Mapping[str, FileRecord] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decisions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layouts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    segments: tuple[Mapping[str, Any], ...] = ()
    task: str = "online"
    version: int = VERSION

    @property
    def next_stage(self) -> str | None:
        """The first stage that is not done, or None if the round is complete."""
        stages = stages_of(self.round, self.task)
        return stages[len(self.stages)] if len(self.stages) < len(stages) else None


@dataclasses.dataclass(slots=True)
class RunInfo:
    """An open run. Its lock is released by `close()` or when the process ends, however it ends."""

    workdir: Path
    is_resumed: bool
    is_writer: bool
    history: History
    ledger: Ledger
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


# --------------------------------------------------------------------------- the workdir


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
                ledger.note_gone(workdir / intact.PROMPTS)  # its prompts or seed may differ
                (workdir / intact.PROMPTS).unlink(missing_ok=True)
                changes.write_history(workdir, history, note=ledger.note_file)
    except BaseException:
        if lock is not None:
            os.close(lock)
        raise
    return RunInfo(workdir, is_resumed, is_writer, history, ledger, lock)


def refuse_other(config: config_lib.Config) -> None:
    """Raise WorkdirError if `config.workdir` holds a run that may not be resumed with `config`."""
    workdir = Path(config.workdir)
    if (workdir / changes.FILE).exists() and not _is_untouched(workdir):
        changes.refuse_changes(workdir, changes.read_history(workdir, config))


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


def round_folder(workdir: str | Path, round: int) -> Path:
    """Return the folder of `round`, `workdir/rounds/0003`."""
    return Path(workdir) / "rounds" / f"{round:04d}"


def _is_untouched(workdir: Path) -> bool:
    """Tell whether a run has written only its config: no file of a stage, no checkpoint."""
    ours = (
        "config.json",
        ".lock",
        "compilation_cache",
        ledgers.FILE,
        intact.INPUTS,
        intact.PROMPTS,
    )
    others = [path for path in workdir.iterdir() if path.name not in ours]
    is_run = changes.is_run(changes.read_plain(workdir / changes.FILE))
    return is_run and not any(path.is_file() or any(path.iterdir()) for path in others)


# --------------------------------------------------------------------------- manifests


def stages_of(round: int, task: str = "online") -> tuple[str, ...]:
    """Return the stages of `round`, or of a standalone task, in order."""
    spec = next((spec for name, spec in TASKS.items() if name == task), TASKS["online"])
    return spec.stages if round or not spec.first_stages else spec.first_stages


def load_manifest(folder: str | Path) -> Manifest | None:
    """Read the manifest in a round's folder; None if no stage of the round is done.

    Raises:
      ManifestError: if the file is not a manifest that this version can read.
    """
    path = Path(folder) / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise _corrupt(path, str(error)) from error
    try:
        manifest = _parse_manifest(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _corrupt(path, f"{type(error).__name__}: {error}") from error
    if manifest.version not in _READABLE:
        raise _corrupt(path, f"version is {manifest.version}, this program reads {_READABLE}")
    if manifest.stages != stages_of(manifest.round, manifest.task)[: len(manifest.stages)]:
        raise _corrupt(path, f"stages {manifest.stages} are out of order")
    return manifest


def save_manifest(folder: str | Path, manifest: Manifest, ledger: Ledger | None = None) -> None:
    """Replace the manifest in `folder`; WorkdirError if it cannot be written."""
    note = ledger.note_file if ledger is not None else None
    storage.write_json_atomic(Path(folder) / MANIFEST, dataclasses.asdict(manifest), note=note)


def commit_stage(
    folder: str | Path,
    manifest: Manifest,
    stage: str,
    *,
    files: Mapping[str, int] | None = None,
    is_writer: bool = True,
    ledger: Ledger | None = None,
    **updates: Any,
) -> Manifest:
    """Record that `stage` is done. It counts as done once the manifest has been replaced.

    Args:
      folder: the round's folder.
      manifest: the round's manifest before the stage.
      stage: the next stage of the round.
      files: name -> number of records, for each file that the stage has written into `folder`.
        The files must be complete and synced; they are hashed here.
      is_writer: False on processes other than 0. These write nothing, but compute the same manifest
        from the files on the shared file system, so they call this after a barrier.
      ledger: where the manifest is recorded.
      **updates: new values of other fields; `metrics` and `decisions` are merged into those there.

    Returns:
      The manifest with the stage in it.

    Raises:
      ManifestError: if the stage is not the next one, or a file is missing.
      WorkdirError: if the manifest cannot be written.
    """
    folder = Path(folder)
    if stage != manifest.next_stage:
        raise ManifestError(
            f"{folder}: got stage {stage!r}, but after {list(manifest.stages)} the next stage is "
            f"{manifest.next_stage!r}"
        )
    missing = [name for name in files or {} if not (folder / name).is_file()]
    if missing:
        raise ManifestError(f"{folder}: stage {stage!r} has not written {', '.join(missing)}")
    updates["stages"] = (*manifest.stages, stage)
    return update_manifest(
        folder, manifest, files=files, is_writer=is_writer, ledger=ledger, **updates
    )


def update_manifest(
    folder: str | Path,
    manifest: Manifest,
    *,
    files: Mapping[str, int] | None = None,
    is_writer: bool = True,
    ledger: Ledger | None = None,
    **updates: Any,
) -> Manifest:
    """Replace the manifest by one with more in it, and return that; see `commit_stage`."""
    folder = Path(folder)
    with storage.explain_os_errors(folder):
        records = {
            name: FileRecord(storage.hash_file(folder / name), int(count))
            for name, count in (files or {}).items()
        }
        updates["metrics"] = {**manifest.metrics, **updates.get("metrics", {})}
        updates["decisions"] = {**manifest.decisions, **updates.get("decisions", {})}
        updates["files"] = {**manifest.files, **records}
        if ledger is not None:
            updates["segments"] = changes.list_segments(ledger.workdir, manifest.round)
        updated = dataclasses.replace(manifest, version=VERSION, **updates)
        if is_writer:
            save_manifest(folder, updated, ledger)
    return updated


def verify_files(folder: str | Path, manifest: Manifest) -> None:
    """Check that the files of a round have the hashes that are in its manifest.

    Raises:
      ManifestError: listing every file that is missing or has changed.
    """
    folder, wrong = Path(folder), []
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif (found := storage.hash_file(path)) != record.sha256:
            wrong.append(f"{name} has sha256 {found[:12]}..., expected {record.sha256[:12]}...")
    if wrong:
        raise ManifestError(
            f"{folder}: files differ from {MANIFEST}: {'; '.join(wrong)}; put the original files "
            "back, or start a new run with --config.workdir=DIR"
        )


def verify_run(workdir: Path) -> None:
    """Check the files of every round, or of the task, in a workdir; see `verify_files`."""
    for path in intact.find_manifests(workdir):
        manifest = load_manifest(path.parent)
        if manifest is not None:
            verify_files(path.parent, manifest)


def _parse_manifest(plain: dict[str, Any]) -> Manifest:
    files = {
        name: FileRecord(str(record["sha256"]), int(record["count"]))
        for name, record in plain["files"].items()
    }
    known = {field.name for field in dataclasses.fields(Manifest)}
    plain = {"segments": [], "decisions": {}, **plain}  # older versions did not write these
    if known != plain.keys():
        raise ValueError(f"missing or unknown fields: {', '.join(sorted(known ^ plain.keys()))}")
    lists = {name: tuple(plain[name]) for name in ("stages", "segments")}
    return Manifest(**{**plain, **lists, "files": files})


def _corrupt(path: Path, reason: str) -> ManifestError:
    return ManifestError(
        f"{path} is not a readable manifest ({reason}); a run replaces it atomically, so something "
        "else changed it: put the original back, or start a new run with --config.workdir=DIR"
    )

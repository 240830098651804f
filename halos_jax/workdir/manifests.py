"""A run as a state machine on disk: a manifest per round.

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos_jax import storage
from halos_jax.config.tasks import TASKS
from halos_jax.errors import UserError
from halos_jax.workdir import changes, intact
from halos_jax.workdir.intact import MANIFEST
from halos_jax.workdir.ledger import Ledger

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
    prompts). `policy` and `reference` name the model that was sampled from and the reference
    ("model.reference" with a hash of its files); `origin`, of round 0, says of which other run the
    policy is that this one starts from (`policies/branch.py`).
    `metrics` are counts and means for people. `decisions` are what the run has chosen by itself in
    this round, under the name of what chose it; a resume reads them and does not choose again.
    `layouts` holds the shapes of the reward model's
    batches (`LayoutMemory.to_record`) at the end of the last stage. `segments` are those of
    config.json that began in this round: what changed in the config, the devices or the data, and
    from which step on. `executed` names, for each stage, the `executions` in which it was computed
    (`execution.py`): on which devices, with which versions and settings. `sampled_by` has the
    fingerprint of the policy that drew the samples in a file, `trained` that of the policy at the
    round's end (`policies/digest.py`). `chain` is set when the last stage is done
    (`seals/chain.py`).
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
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layouts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    segments: tuple[Mapping[str, Any], ...] = ()
    executions: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    executed: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    sampled_by: Mapping[str, str] = dataclasses.field(default_factory=dict)
    trained: str = ""
    chain: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task: str = "online"
    version: int = VERSION

    @property
    def next_stage(self) -> str | None:
        """The first stage that is not done, or None if the round is complete."""
        stages = stages_of(self.round, self.task)
        return stages[len(self.stages)] if len(self.stages) < len(stages) else None


def round_folder(workdir: str | Path, round: int) -> Path:
    """Return the folder of `round`, `workdir/rounds/0003`."""
    return Path(workdir) / "rounds" / f"{round:04d}"


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
      **updates: new values of other fields; `metrics`, `decisions` and `sampled_by` are
        merged into those there.

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
        for name in ("metrics", "decisions", "sampled_by"):
            updates[name] = {**getattr(manifest, name), **updates.get(name, {})}
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
    later: dict[str, Any] = {"segments": [], "trained": ""}  # older versions did not write these
    maps = ("decisions", "origin", "executions", "executed", "sampled_by", "chain")
    plain = {**later, **{name: {} for name in maps}, **plain}
    if known != plain.keys():
        raise ValueError(f"missing or unknown fields: {', '.join(sorted(known ^ plain.keys()))}")
    lists = {name: tuple(plain[name]) for name in ("stages", "segments")}
    executed = {stage: tuple(names) for stage, names in plain["executed"].items()}
    return Manifest(**{**plain, **lists, "files": files, "executed": executed})


def _corrupt(path: Path, reason: str) -> ManifestError:
    return ManifestError(
        f"{path} is not a readable manifest ({reason}); a run replaces it atomically, so something "
        "else changed it: put the original back, or start a new run with --config.workdir=DIR"
    )

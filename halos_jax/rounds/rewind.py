"""Go back to the last round that a run has a checkpoint of; later rounds are done again."""

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from halos_jax import processes, storage
from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.rounds.outcome.decisions import NAMES
from halos_jax.rounds.proof.rescore import FILE as RESCORED
from halos_jax.rounds.replay.choose import FILE as REPLAY
from halos_jax.workdir import manifests
from halos_jax.workdir.intact import MANIFEST
from halos_jax.workdir.ledger import Ledger
from halos_jax.workdir.manifests import Manifest, ManifestError, round_folder

logger = logging.getLogger(__name__)

# The stages of a round that do not depend on its training: stage -> its file.
_BEFORE = {"sample": "samples.jsonl", "score": "scores.jsonl", "feedback": "feedback.jsonl"}
_KEPT = (*_BEFORE.values(), RESCORED, REPLAY)  # files of these stages


def rewind(workdir: Path, ledger: Ledger, trained: int, *, has_checkpoint: bool) -> None:
    """Undo the rounds whose training is in no checkpoint any more, and log which they are.

    The round after `trained` keeps its samples and feedback, since the current policy is the one
    that drew them; anything later is deleted. Usually there is nothing to do.

    Args:
      trained: the last round that the current policy was trained in.
      has_checkpoint: whether that policy was restored from a checkpoint.

    Raises:
      CheckpointError: if it was not: then all rounds would have to be done again.
    """
    known = processes.run_on_all(lambda: _load_manifests(workdir), ManifestError)
    lost = [m.round for m in known if m.round > trained and "train" in m.stages]
    if lost and not has_checkpoint:
        raise CheckpointError(
            f"{workdir / 'checkpoints'}: no checkpoint is left, but {len(lost)} round(s) are "
            "trained; put the newest one back, or start a new run with --config.workdir=DIR"
        )
    if lost:
        logger.warning(
            "the training of round %s is lost with its checkpoint: done again from round %d on",
            ", ".join(map(str, lost)),
            lost[0],
        )
        processes.run_on_first(lambda: _remove_lost(workdir, ledger, lost[0], known))


def _remove_lost(workdir: Path, ledger: Ledger, first: int, known: Sequence[Manifest]) -> None:
    # From the last round down: if this process is killed, the next one finds the rest.
    for folder in reversed(_list_folders(workdir)):
        if int(folder.name) > first:
            _remove(folder, ledger)
    (before,) = (one for one in known if one.round == first)
    _take_back(round_folder(workdir, first), before, ledger)


def _list_folders(workdir: Path) -> list[Path]:
    found = [path for path in (workdir / "rounds").glob("*") if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def _load_manifests(workdir: Path) -> list[Manifest]:
    """Return the manifests of all rounds, in order."""
    found = [manifests.load_manifest(folder) for folder in _list_folders(workdir)]
    return [one for one in found if one is not None]


def _take_back(folder: Path, manifest: Manifest, ledger: Ledger) -> None:
    """Restore a round to what it was before its training."""
    kept = {name: record for name, record in manifest.files.items() if name in _KEPT}
    # Metrics are in the order of the stages: what comes after feedback's is of training and after.
    names = list(manifest.metrics)
    last = max((at for at, name in enumerate(names) if name.startswith("feedback")), default=-1)
    metrics = {name: manifest.metrics[name] for name in names[: last + 1]}
    decided = {name: one for name, one in manifest.decisions.items() if name not in NAMES}
    executed = {stage: names for stage, names in manifest.executed.items() if stage in _BEFORE}
    before = dataclasses.replace(
        manifest,
        stages=tuple(_BEFORE),
        files=kept,
        metrics=metrics,
        decisions=decided,
        executed=executed,
        sampled_by={name: one for name, one in manifest.sampled_by.items() if name in kept},
        trained="",
        chain={},
    )
    with storage.explain_os_errors(folder):
        manifests.save_manifest(folder, before, ledger)
        for name in manifest.files.keys() - kept.keys():
            (folder / name).unlink(missing_ok=True)
        _remove_model(folder / "model", ledger)


def _remove(folder: Path, ledger: Ledger) -> None:
    with storage.explain_os_errors(folder):
        ledger.note_gone(folder / MANIFEST)
        (folder / MANIFEST).unlink(missing_ok=True)
        _remove_model(folder / "model", ledger)
        shutil.rmtree(folder)


def _remove_model(folder: Path, ledger: Ledger) -> None:
    ledger.note_gone(folder)
    if folder.is_dir():
        # Rename it first: a half-deleted model would count as damaged.
        shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.partial")))

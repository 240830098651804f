"""Which policy drew the data of a task that is started by hand: what the run that left them says.

A file of samples, scores or feedback lies beside the manifest of what has written it. That has the
file's hash and, in `sampled_by`, the fingerprint of the policy that drew the samples; a task that
makes files of them carries it on.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from halos_jax import storage
from halos_jax.checkpoints.position import Position
from halos_jax.checkpoints.store import read_checkpoints
from halos_jax.policies.source import Source
from halos_jax.rounds.proof.origin import OriginError, identify
from halos_jax.training.followers import take_policy
from halos_jax.training.loop import Trainer
from halos_jax.types import Item, Params
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import Manifest, ManifestError, round_folder

logger = logging.getLogger(__name__)

_SAMPLES = ("samples.jsonl", "eval.jsonl")  # the files of samples that others are made of


def find_sampler(paths: Iterable[Path]) -> str:
    """Return the fingerprint of the policy that drew the samples of all files; "" if unknown.

    It is unknown of files without a manifest beside them, of those that were changed since, which
    is logged, and where several policies drew them.
    """
    found = {_read_sampler(path) for path in paths}
    if len(found - {""}) > 1:
        logger.info("the samples were drawn by %d policies: none is recorded", len(found - {""}))
    return found.pop() if len(found) == 1 else ""


def carry_on(sampler: str, *files: str) -> dict[str, Any]:
    """Return the field of a manifest that says who drew the samples that `files` are made of."""
    return {"sampled_by": dict.fromkeys(files, sampler)} if sampler else {}


def _read_sampler(path: Path) -> str:
    try:
        manifest = manifests.load_manifest(path.parent)
    except ManifestError:  # of something else, or of a later version
        return ""
    if manifest is None:
        return ""
    name = next((one for one in (path.name, str(path.absolute())) if one in manifest.files), "")
    if not name:
        return ""
    if storage.hash_file(path) != manifest.files[name].sha256:
        logger.warning(
            "%s was changed after its run wrote it: which policy drew its samples is not known",
            path,
        )
        return ""
    made_of = (one for one in (name, *_SAMPLES) if one in manifest.sampled_by)
    return manifest.sampled_by.get(next(made_of, ""), "")


def warn_of_sampler(
    trainer: Trainer,
    items: Sequence[Item],
    paths: Iterable[Path],
    load_params: Callable[[], Params],
) -> None:
    """Say where a loss takes the policy at the start for the one that sampled, and it is another.

    Args:
      items: what is trained on; those without log-probabilities get those of the start.
      paths: the files that they were read from.
      load_params: returns the params that the run starts from.
    """
    if not trainer.loss.old or all(item.old_logps for item in items):
        return
    sampler = find_sampler(paths)
    if not sampler:
        return
    start = identify(take_policy(load_params()), trainer.frozen, trainer.decoder).fingerprint
    if sampler != start:
        logger.warning(
            "data.train: its samples were drawn by the policy %.12s and have no log-probabilities, "
            "and the run starts from %.12s: loss %s takes that for the policy that sampled; sample "
            "with --config.sampling.keep_logps=true, or start from the policy that sampled",
            sampler,
            start,
            trainer.loss.name,
        )


def check_source(source: Source, found: str) -> None:
    """Refuse a checkpoint whose policy is not the one that its round ended with.

    Nothing is said of a checkpoint in the middle of a round, nor of one of an averaged policy that
    was never evaluated.

    Args:
      found: the fingerprint of the policy that was loaded.
    """
    if source.workdir is None or source.checkpoint is None or source.run is None:
        return
    checkpoints = read_checkpoints(source.workdir / "checkpoints")
    try:
        position = Position.from_dict(checkpoints.read_round_state(source.checkpoint))
    finally:
        checkpoints.close()
    if position.round is None or position.in_stage:
        return
    manifest = manifests.load_manifest(round_folder(source.workdir, position.round))
    expected = _list_policies(manifest, is_averaged=source.run.train.ema_decay > 0)
    if expected and found not in expected:
        raise OriginError(
            f"model.path: checkpoint {source.checkpoint} of {source.workdir} holds the policy "
            f"{found[:12]}, but round {position.round} ended with {sorted(expected)[0][:12]}; "
            "allowed: the policy of its round; put the checkpoint back as it was, or choose "
            "another with --config.model.checkpoint=N"
        )


def _list_policies(manifest: Manifest | None, *, is_averaged: bool) -> set[str]:
    """Return the fingerprints that the policy at the end of a round may have; none if unknown."""
    if manifest is None or not manifest.trained:
        return set()
    if not is_averaged:
        return {manifest.trained}
    evaluated = manifest.sampled_by.get("eval.jsonl", "")
    return {evaluated} if evaluated else set()

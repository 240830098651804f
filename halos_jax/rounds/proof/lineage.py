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
from halos_jax.rounds.proof.origin import identify
from halos_jax.training.followers import take_policy
from halos_jax.training.loop import Trainer
from halos_jax.types import Item, Params
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import ManifestError

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

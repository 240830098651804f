"""Which weights a round's samples were drawn from, and whether these are the policy's.

    "sampled_by": {"samples.jsonl": FINGERPRINT, ...}    in the manifest of the round
    "trained": FINGERPRINT                               of the policy at the round's end

The fingerprint is that of the train state's policy. It is tied to what the sampler decodes with by
the digests of these weights, layer by layer, in the compute dtype (`policies/digest.py`).
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from halos_jax.data.records import formats as records
from halos_jax.data.records import reading
from halos_jax.errors import UserError
from halos_jax.models.lora import Frozen
from halos_jax.models.spec import DecoderConfig
from halos_jax.policies import digest
from halos_jax.policies.digest import Folded
from halos_jax.policies.source import Source
from halos_jax.sampling.sampler import Sampler
from halos_jax.types import Params, Prompt, Sample
from halos_jax.workdir.manifests import Manifest, load_manifest, round_folder

logger = logging.getLogger(__name__)


class OriginError(UserError, RuntimeError):
    """Samples are not those of the policy that they should be of."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """The policy that samples are to be drawn from, known before the sampler has it.

    Attributes:
      fingerprint: that of its trained params and, with an adapter, of the base.
      folded: the digests of the weights that the sampler must hold, by name.
    """

    fingerprint: str = ""
    folded: Folded = dataclasses.field(default_factory=dict)


UNKNOWN = Origin()


def identify(params: Params, frozen: Frozen | None, config: DecoderConfig) -> Origin:
    """Return the origin of what a policy will sample. All processes call this.

    Args:
      params: the trained params, without a value head; of an adapter, if there is a `frozen` base.
    """
    whole = params if frozen is None else {**frozen.base, **params, "layers": _keep_plain(frozen)}
    return Origin(*digest.identify(params, frozen, whole, config))


def _keep_plain(frozen: Frozen) -> Params:
    """Return the layers' weights of a base that no adapter is added to."""
    adapted = {path for module in frozen.adapter.modules for path in module.paths}
    return {name: leaf for name, leaf in frozen.base["layers"].items() if name not in adapted}


def check_weights(origin: Origin, weights: Params, config: DecoderConfig, what: str) -> None:
    """Refuse weights that the sampler would decode with, if they are not those of `origin`.

    Args:
      weights: from `Sampler.unstack`.
      what: which samples, in words.
    """
    if not origin.folded:
        return
    found = digest.fold_weights(weights, config, origin.folded.keys())
    wrong = digest.find_other(origin.folded, found)
    if wrong:
        raise OriginError(
            f"{what}: the sampler holds other weights than the policy "
            f"{origin.fingerprint[:12]}: {'; '.join(wrong[:8])}"
            f"{f' and {len(wrong) - 8} more' if len(wrong) > 8 else ''}; allowed: the policy's "
            "own, in model.compute_dtype; nothing was sampled, and what is done is kept: run the "
            "same command again, and if this comes back, report it, or look for a device with "
            "faulty memory"
        )


def unstack(sampler: Sampler, params: Params, origin: Origin, what: str) -> Params:
    """Return the weights that the sampler decodes with; see `check_weights`."""
    weights = sampler.unstack(params)
    check_weights(origin, weights, sampler.decoder, what)
    return weights


def check_policy(round: int, found: str, before: Manifest | None, now: Manifest) -> None:
    """Refuse to sample for a round with another policy than the one that it should start from.

    Args:
      found: the fingerprint of the policy in memory.
      before: the manifest of the round that this one starts from.
      now: that of the round itself, with how its first stage is executed.
    """
    if before is None or not before.trained or before.trained == found:
        return
    problem = (
        f"round {round}: the policy in memory is {found[:12]}, but round {before.round} ended with "
        f"{before.trained[:12]}"
    )
    if before.round == 0 and _is_executed_otherwise(before, now):
        # Weights that are drawn or averaged at the start may round otherwise elsewhere.
        logger.warning(
            "%s: on other devices or with other versions its start is not the same to the bit",
            problem,
        )
        return
    raise OriginError(
        f"{problem}; allowed: that policy; put back the checkpoint of round {before.round} and the "
        "model as they were, or start a new run with --config.workdir=DIR"
    )


def check_trained(manifest: Manifest, found: str) -> None:
    """Refuse the policy `found` at the end of a round that has another one in its manifest."""
    if manifest.trained and found and manifest.trained != found:
        raise OriginError(
            f"round {manifest.round}: its training ended with the policy {manifest.trained[:12]}, "
            f"but that in memory is {found[:12]}; allowed: the policy of its checkpoint; put the "
            "checkpoint back as it was, or start a new run with --config.workdir=DIR"
        )


def check_source(source: Source, found: str) -> None:
    """Refuse a policy at the end of a run's round that is not the one of the round's manifest.

    Args:
      source: where the policy comes from.
      found: its fingerprint.
    """
    run, place = source.run, source.position
    if run is None or place is None or place.round is None or place.in_stage:
        return
    manifest = load_manifest(round_folder(source.workdir or run.workdir, place.round))
    if manifest is None:
        return
    averaged = "" if run.train.ema_decay else manifest.trained
    expected = manifest.sampled_by.get("eval.jsonl", averaged)
    # The base of an adapter has the run's dtype, which may change on a resume.
    if not expected or expected.partition("+")[0] == found.partition("+")[0]:
        return
    problem = (
        f"{source.path}: its policy is {found[:12]}, but in the manifest of round {place.round} it "
        f"is {expected[:12]}"
    )
    if not place.round:
        logger.warning("%s: on other devices weights that are drawn may round otherwise", problem)
        return
    raise OriginError(
        f"{problem}; allowed: that policy; put back the checkpoint of round {place.round} as it was"
    )


def check_samples(manifest: Manifest, file: str, before: Manifest | None) -> None:
    """Refuse the samples in a round's `file` if another policy drew them than the round began with.

    Args:
      manifest: that of the round.
      before: that of the round that it starts from.
    """
    drawn, expected = manifest.sampled_by.get(file, ""), before.trained if before else ""
    if not (drawn and expected and before) or drawn == expected:
        return
    if before.round == 0 and _is_executed_otherwise(before, manifest):
        return  # warned of when they were drawn
    raise OriginError(
        f"round {manifest.round}: {file} was drawn by the policy {drawn[:12]}, but the round "
        f"starts from that at the end of round {before.round}, {expected[:12]}; allowed: samples "
        "of that policy; put back the files of both rounds as they were, or start a new run with "
        "--config.workdir=DIR"
    )


def check_alike(manifest: Manifest) -> None:
    """Refuse a round of which one part was drawn by another policy than the others."""
    found = sorted(set(manifest.sampled_by.values()))
    if len(found) > 1:
        raise OriginError(
            f"round {manifest.round}: parts of its samples were drawn by several policies, "
            f"{', '.join(one[:12] for one in found)}; allowed: one; put the files of the round "
            "back as they were, or start a new run with --config.workdir=DIR"
        )


def _is_executed_otherwise(one: Manifest, other: Manifest) -> bool:
    """Tell whether two rounds were not executed alike, or nothing is known of it."""
    found = [
        {name for names in manifest.executed.values() for name in names}
        for manifest in (one, other)
    ]
    return not (found[0] and found[0] == found[1])


def name_sampled(origin: Origin, *files: str) -> dict[str, Any]:
    """Return the field of a manifest that says what drew the samples in `files`."""
    known = dict.fromkeys(files, origin.fingerprint) if origin.fingerprint else {}
    return {"sampled_by": known}


# --------------------------------------------------------------------------- shards

_MARK = "sampled_by"  # in each record of a shard, beside the sample's own fields


def mark_rows(samples: Sequence[Sample], origin: Origin) -> Iterator[dict[str, Any]]:
    """Yield the records of a shard: its samples, each with the fingerprint of what drew it."""
    mark = {_MARK: origin.fingerprint} if origin.fingerprint else {}
    return (records.sample_to_record(sample) | mark for sample in samples)


def find_shard(
    path: Path, prompts: Sequence[Prompt], per_prompt: int, origin: Origin
) -> list[Sample] | None:
    """Return the samples in a shard that is on disk; None if it has to be sampled (again).

    It has if it holds samples of other prompts, as shards may have had another size, or of another
    policy than `origin`.
    """
    if not path.exists():
        return None
    samples, marks = list[Sample](), set[str]()
    for line, record in reading.read_records(path):
        marks.add(str(record.pop(_MARK, "")))
        samples.append(records.sample_from_record(record, file=str(path), line=line))
    found = [(sample.prompt.prompt_id, sample.sample_id) for sample in samples]
    if found != [(one.prompt_id, number) for one in prompts for number in range(per_prompt)]:
        logger.info("%s: holds samples of other prompts; sampling it again", path)
        return None
    other = marks - {"", origin.fingerprint}  # "": by a version that did not note it
    if origin.fingerprint and other:
        logger.info(
            "%s: was drawn by the policy %.12s, and this is %.12s; sampling it again",
            path,
            other.pop(),
            origin.fingerprint,
        )
        return None
    return samples

"""The signs of a round's fresh samples, measured before the first step of its training.

Their file is a shard until the train stage is committed: whole or absent, known to the ledger, and
made again where it is not as it was written. So a run that is resumed in the middle of a round's
training has the signs that it had.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halos_jax import sharding
from halos_jax.config import Config
from halos_jax.data.records import reading
from halos_jax.devices import explain_memory
from halos_jax.packing.token_values import TokenValues
from halos_jax.rounds.context import NOTHING, Run, StageResult
from halos_jax.rounds.watch import replayed
from halos_jax.rounds.watch import watched as watching
from halos_jax.rounds.watch.watched import Key
from halos_jax.signs import fresh
from halos_jax.signs.implicit import Scale, find_scale
from halos_jax.signs.intervals import Estimate
from halos_jax.types import CHOSEN, REJECTED, Item, Params, Sample
from halos_jax.workdir.manifests import round_folder

logger = logging.getLogger(__name__)

FILE = "signs.shard-0000.jsonl"


def measure_before(
    run: Run,
    samples: Sequence[Sample],
    items: Sequence[Item],
    reference: TokenValues | None,
    load_sft: Callable[[], Params],
    *,
    round: int,
) -> dict[str, Any] | None:
    """Return the record of the signs of the round's fresh samples; None if it is on disk.

    Args:
      samples: the round's, with their rewards.
      items: what the round trains on.
      reference: the log-probabilities of their targets under the reference "sft"; None if the loss
        does not need them.
      load_sft: returns the params of that reference, `run.referring` runs it.
    """
    began, folder = time.monotonic(), round_folder(run.workdir, round)
    watched = watching.choose_watched(run.config, samples, round)
    watching.plan_watched(run, watched)
    if run.config.feedback.replay:
        watching.plan_watched(run, replayed.choose_watched(run, round)[0])
    is_known = (folder / FILE).exists()
    # No process may write the file until all have looked for it: they must all agree.
    sharding.wait_for_all(f"looked for {FILE} of round {round}")
    if is_known:
        return None
    ratios = _find_ratios(run, samples, watched, items, reference, load_sft)
    compared = items if reference is not None else ()
    metrics = measure_fresh(run.config, samples, watched, ratios, compared)
    logger.debug("round %d: signs before training in %.2f s", round, time.monotonic() - began)
    return {"round": round, "metrics": metrics}


def read_before(folder: Path) -> StageResult:
    """Return the signs in a round's folder as a part of its train stage; nothing if it has none."""
    path = folder / FILE
    if not path.exists():  # of a round that was trained by a version without them
        return NOTHING
    ((_, record),) = reading.read_records(path)
    return StageResult({}, record["metrics"])


def _find_ratios(
    run: Run,
    samples: Sequence[Sample],
    watched: Sequence[Sample],
    items: Sequence[Item],
    reference: TokenValues | None,
    load_sft: Callable[[], Params],
) -> dict[Key, float]:
    """Return the log-ratios to the reference "sft" (nats) of the watched samples, and of all others
    that the loss's pass with the reference has met.

    A pass of their own is made only if that one has not met all of the watched samples.
    """
    drawn = {watching.key_of(one): one.sum_logps for one in samples if one.sum_logps is not None}
    known = watching.sum_by_key(items, reference) if reference is not None else {}
    if any(watching.key_of(one) not in known for one in watched):
        with explain_memory("signs", "the signs of a round's fresh samples", run.config):
            asked = dataclasses.replace(run, trainer=run.referring)
            sums = watching.compute_sums(asked, watched, load_sft(), label="signs")
        found = zip(map(watching.key_of, watched), sums, strict=True)
        known |= dict(found)
    return {key: logp - known[key] for key, logp in drawn.items() if key in known}


def measure_fresh(
    config: Config,
    samples: Sequence[Sample],
    watched: Sequence[Sample],
    ratios: Mapping[Key, float],
    items: Sequence[Item],
) -> dict[str, float]:
    """Return the metrics of a round's fresh samples.

    Args:
      ratios: the log-ratios that are known, at least of the watched samples.
      items: the round's training items, if log-ratios of all of them are known.
    """
    scale = find_scale(config.loss)
    found: dict[str, Estimate] = {}
    if watched:
        found |= fresh.measure_divergence(
            [ratios[watching.key_of(one)] for one in watched],
            [len(one.response_ids) for one in watched],
            [one.prompt.prompt_id for one in watched],
            name="kl_sft" if watching.is_exact(config.sampling) else "kl_sampled",
        )
    known = [one for one in samples if watching.key_of(one) in ratios]
    pairs = _list_pairs(items, samples, ratios, scale)
    if not pairs:
        pairs = fresh.pick_extremes(_list_scored(known, ratios, scale))
    found |= fresh.measure_pairs([margin for _, margin in pairs], [name for name, _ in pairs])
    found |= fresh.measure_agreement(_list_scored(watched, ratios, scale))
    found |= fresh.measure_rewards(samples)
    found |= fresh.measure_responses(samples)
    return watching.name_metrics(found)


def _list_scored(
    samples: Sequence[Sample], ratios: Mapping[Key, float], scale: Scale
) -> list[tuple[str, float, float]]:
    """Return (prompt id, implicit reward, reward) of the samples that have a reward."""
    return [
        (
            one.prompt.prompt_id,
            scale.weigh(ratios[watching.key_of(one)], len(one.response_ids)),
            one.reward,
        )
        for one in samples
        if one.reward is not None
    ]


def _list_pairs(
    items: Sequence[Item], samples: Sequence[Sample], ratios: Mapping[Key, float], scale: Scale
) -> list[tuple[str, float]]:
    """Return (prompt id, margin) of each item that is a pair with known log-ratios."""
    names = {watching.key_of(one): one.prompt.prompt_id for one in samples}
    pairs = []
    for item in items:
        keys = watching.list_keys(item)
        if item.roles == (CHOSEN, REJECTED) and all(key in ratios for key in keys):
            chosen, rejected = (
                scale.weigh(ratios[key], len(response))
                for key, response in zip(keys, item.responses, strict=True)
            )
            pairs.append((names[keys[0]], chosen - rejected))
    return pairs

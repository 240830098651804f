"""The samples of a round that are watched, and their log-probabilities under another policy."""

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np

from halos_jax.config import Config, SamplingConfig
from halos_jax.data.records.formats import digest
from halos_jax.data.tokenize import make_group_items
from halos_jax.once import say_once
from halos_jax.packing.token_values import TokenValues
from halos_jax.rounds.context import Run
from halos_jax.signs.fresh import group_samples
from halos_jax.signs.intervals import Estimate, name_estimate
from halos_jax.training import loop as training
from halos_jax.types import Item, Params, Sample

logger = logging.getLogger(__name__)

_NAME = "watched"  # of the layout of their passes

# A response and the prompt that it answers, as token ids: the same text has the same.
Key = tuple[bytes, bytes]


def is_exact(settings: SamplingConfig) -> bool:
    """Tell whether samples are drawn from the policy itself: at temperature 1, from all tokens."""
    return settings.temperature == 1 and settings.top_p == 1 and settings.top_k == 0


def choose_watched(config: Config, samples: Sequence[Sample], round: int) -> list[Sample]:
    """Return `rounds.watch_samples` of a round's samples at most, all of a prompt or none.

    Which prompts these are depends on (seed, round, prompt id) alone; one is watched at least,
    unless none is to be. Samples that a version without `sum_logps` has drawn are not watched,
    nor are prompts with a sample that is longer than a row; both are logged.
    """
    count, seed = config.rounds.watch_samples, config.seed
    groups = {
        name: group
        for name, group in group_samples(samples).items()
        if all(one.sum_logps is not None for one in group)
    }
    if count and not groups:
        logger.info(
            "round %d: its samples have no sum_logps (an earlier version drew them): signs that "
            "compare policies are left out",
            round,
        )
    groups = _leave_long(groups, config.train.tokens_per_device, round) if count else groups
    if count < 0:
        chosen = set(groups)
    else:
        chosen, taken = set[str](), 0
        for name in sorted(groups, key=lambda name: digest("watch", seed, round, name)):
            if (taken and taken + len(groups[name]) > count) or not count:
                break
            chosen.add(name)
            taken += len(groups[name])
    return [one for name, group in groups.items() if name in chosen for one in group]


def _leave_long(
    groups: Mapping[str, list[Sample]], most: int, round: int
) -> dict[str, list[Sample]]:
    """Return the groups of which every sample fits into a row; say how many do not.

    Such a sample has not kept a round from being trained on other ones, and does not now.
    """
    kept = {
        name: group
        for name, group in groups.items()
        if all(len(one.prompt_ids) + len(one.response_ids) <= most for one in group)
    }
    if len(kept) < len(groups):
        say_once(
            logger,
            "round %d: %d of %d prompts have a sample of more than train.tokens_per_device=%d "
            "tokens: they are not watched, so the signs are of the others; raise it",
            round,
            len(groups) - len(kept),
            len(groups),
            most,
        )
    return kept


def plan_watched(run: Run, watched: Sequence[Sample]) -> None:
    """Take note of the shapes of the watched samples, as a pass over them would.

    They are a part of what a checkpoint keeps: so they must be known before the round's training
    is saved, whether or not a resumed run needs the pass again.
    """
    if watched:
        items, _ = _make_items(run, watched)
        training.plan_pass(run.trainer, items, recurring=_NAME)


def compute_sums(run: Run, watched: Sequence[Sample], params: Params, *, label: str) -> list[float]:
    """Return the log-probability (nats) of each watched response under `params`, in one pass."""
    return [sum_tokens(logps) for logps in compute_tokens(run, watched, params, label=label)]


def compute_tokens(
    run: Run, watched: Sequence[Sample], params: Params, *, label: str
) -> list[np.ndarray]:
    """Return the log-probabilities f32[tokens] of each watched response, as `compute_sums`."""
    items, members = _make_items(run, watched)
    found = training.compute_logps(run.trainer, items, params, recurring=_NAME, label=label)
    tokens = {
        number: logps
        for numbers, parts in zip(members, found, strict=True)
        for number, logps in zip(numbers, parts, strict=True)
    }
    return [tokens[number] for number in range(len(watched))]


def _make_items(run: Run, watched: Sequence[Sample]) -> tuple[list[Item], list[list[int]]]:
    return make_group_items(watched, max_tokens=run.config.train.tokens_per_device)


def sum_by_key(items: Sequence[Item], logps: TokenValues) -> dict[Key, float]:
    """Return the log-probability of each response of the items that is a target as a whole."""
    found: dict[Key, float] = {}
    for item, parts in zip(items, logps, strict=True):
        prompt = _encode(item.prompt_ids)
        for response, part in zip(item.responses, parts, strict=True):
            if len(part) == len(response):
                found[prompt, _encode(response)] = sum_tokens(part)
    return found


def sum_tokens(logps: np.ndarray) -> float:
    """Return the sum of a response's log-probabilities, without rounding in between."""
    return math.fsum(logps.tolist())


def key_of(sample: Sample) -> Key:
    """Return the key of a sample."""
    return _encode(sample.prompt_ids), _encode(sample.response_ids)


def list_keys(item: Item) -> list[Key]:
    """Return the key of each response of an item."""
    prompt = _encode(item.prompt_ids)
    return [(prompt, _encode(response)) for response in item.responses]


def _encode(ids: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


def name_metrics(signs: Mapping[str, Estimate | float]) -> dict[str, float]:
    """Return the metrics of signs; those that are not finite are left out, which is logged."""
    metrics: dict[str, float] = {}
    for name, sign in signs.items():
        named = name_estimate(name, sign) if isinstance(sign, Estimate) else {name: sign}
        if all(map(math.isfinite, named.values())):
            metrics |= named
        else:
            say_once(logger, "%s is not finite (%s): it is left out", name, sign)
    return metrics

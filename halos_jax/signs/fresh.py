"""Signs of fresh samples, before a round trains on them: what they are like, and what the policy
that drew them says of them.

A log-ratio is log p(response) under the policy that sampled less that under the SFT checkpoint, in
nats. Names are those of `table.FRESH`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from halos_jax.signs.intervals import (
    Estimate,
    estimate_clustered_share,
    estimate_mean,
    estimate_ratio,
    estimate_share,
)
from halos_jax.types import FINISH_LENGTH, Sample

Estimates = Mapping[str, Estimate]


def measure_responses(samples: Sequence[Sample]) -> Estimates:
    """Return length, truncation and repetition of all samples, and the entropy if all have it."""
    prompts = [one.prompt.prompt_id for one in samples]
    lengths = [float(len(one.response_ids)) for one in samples]
    truncated = [float(one.finish_reason == FINISH_LENGTH) for one in samples]
    repeated = [measure_repetition(one.response_ids) for one in samples]
    found = {
        "truncated_share": estimate_clustered_share(truncated, prompts),
        "response_tokens_mean": estimate_mean(lengths, prompts),
        "repeated_4grams": estimate_mean(repeated, prompts),
    }
    entropies = [one.mean_entropy for one in samples if one.mean_entropy is not None]
    if len(entropies) == len(samples):
        sums = [entropy * length for entropy, length in zip(entropies, lengths, strict=True)]
        found["entropy"] = estimate_ratio(sums, lengths, prompts)
    return found


def measure_repetition(response_ids: Sequence[int]) -> float:
    """Return the share of a response's 4-grams that occurred before in it; 0 if it has none.

    Example:
      >>> measure_repetition([1, 2, 3, 4, 1, 2, 3, 4])  # 1 2 3 4 comes twice, of five 4-grams
      0.2
    """
    count = len(response_ids) - 3
    if count < 1:
        return 0.0
    grams = set(zip(*(response_ids[start : start + count] for start in range(4)), strict=True))
    return 1 - len(grams) / count


def measure_rewards(samples: Sequence[Sample]) -> Estimates:
    """Return mean, best, worst and spread of the rewards, and the share of prompts that tie.

    Samples without a reward have no part in the mean, and their prompts none in what compares the
    samples of a prompt: a missing one could be the best, and break a tie.
    """
    labelled = [(one.prompt.prompt_id, one.reward) for one in samples if one.reward is not None]
    if not labelled:
        return {}
    names, rewards = zip(*labelled, strict=True)
    found = {"reward_train_mean": estimate_mean(rewards, names)}
    groups = [
        [one.reward for one in group if one.reward is not None]
        for group in group_samples(samples).values()
        if all(one.reward is not None for one in group)
    ]
    if groups:
        found["reward_best"] = estimate_mean([max(group) for group in groups])
        found["reward_worst"] = estimate_mean([min(group) for group in groups])
        found["reward_spread"] = estimate_mean([float(np.std(group)) for group in groups])
    compared = [group for group in groups if len(group) > 1]
    if compared:
        tied = sum(len(set(group)) == 1 for group in compared)
        found["tied_share"] = estimate_share(tied, len(compared))
    return found


def group_samples(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Return the samples of each prompt id, in their order."""
    groups: dict[str, list[Sample]] = {}
    for one in samples:
        groups.setdefault(one.prompt.prompt_id, []).append(one)
    return groups


def measure_divergence(
    ratios: Sequence[float], lengths: Sequence[int], prompts: Sequence[str], *, name: str
) -> Estimates:
    """Return the mean log-ratio under `name`, and by token under NAME_per_token.

    It estimates the KL divergence of the policy from the SFT checkpoint where the responses are
    drawn from the policy itself.

    Args:
      lengths, prompts: the tokens and the prompt of each response.
    """
    return {
        name: estimate_mean(list(ratios), prompts),
        f"{name}_per_token": estimate_ratio(list(ratios), list(map(float, lengths)), prompts),
    }


def measure_pairs(margins: Sequence[float], prompts: Sequence[str]) -> Estimates:
    """Return margin, accuracy and loss of pairs.

    Args:
      margins: implicit reward of the better response less that of the worse one.
    """
    if not margins:
        return {}
    return {
        "fresh_margin": estimate_mean(margins, prompts),
        "fresh_accuracy": estimate_clustered_share([_judge(one) for one in margins], prompts),
        "fresh_loss": estimate_mean([float(np.logaddexp(0.0, -one)) for one in margins], prompts),
    }


def _judge(margin: float) -> float:
    """Return 1 for a margin above 0, 0 for one below, and 1/2 for none."""
    return (1 + math.copysign(1, margin)) / 2 if margin else 0.5


def measure_agreement(scored: Sequence[tuple[str, float, float]]) -> Estimates:
    """Return the accuracy of the implicit reward over the pairs of each prompt's samples.

    Args:
      scored: prompt id, implicit reward and reward of each sample.
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, implicit, reward in scored:
        groups.setdefault(name, []).append((implicit, reward))
    hits, names = [], []
    for name, group in groups.items():
        for one, other in itertools.combinations(group, 2):
            if one[1] != other[1]:
                better, worse = (one, other) if one[1] > other[1] else (other, one)
                hits.append(_judge(better[0] - worse[0]))
                names.append(name)
    return {"implicit_accuracy": estimate_clustered_share(hits, names)} if hits else {}


def pick_extremes(scored: Sequence[tuple[str, float, float]]) -> list[tuple[str, float]]:
    """Return (prompt id, margin) of the best and the worst sample of each prompt that has both.

    Args:
      scored: as in `measure_agreement`. The first of equal rewards is taken.
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, implicit, reward in scored:
        groups.setdefault(name, []).append((implicit, reward))
    found = []
    for name, group in groups.items():
        best, worst = max(group, key=lambda one: one[1]), min(group, key=lambda one: one[1])
        if best[1] > worst[1]:
            found.append((name, best[0] - worst[0]))
    return found

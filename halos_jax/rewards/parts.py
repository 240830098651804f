"""Several rewards as one: a weighted sum of scores, each normalised as its part says."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from halos_jax.config.rewards import PartConfig, RewardConfig
from halos_jax.rewards.labels import Labels, RewardError, Scorer
from halos_jax.types import Sample

_OWN = ("weight", "normalise")
# A field of the reward in a message; not the end of a path or of a file's name.
_OF_REWARD = re.compile(r"(?<![\w./-])reward\.(?!py\b)")


def part_to_reward(part: PartConfig, reward: RewardConfig) -> RewardConfig:
    """Return the reward that has the fields of a part, and of `reward` those that no part has."""
    fields = [field.name for field in dataclasses.fields(part) if field.name not in _OWN]
    changes = {name: getattr(part, name) for name in fields}
    return dataclasses.replace(reward, parts={}, **changes)


def make_sum_scorer(parts: Mapping[str, tuple[PartConfig, Scorer]]) -> Scorer:
    """Return the scorer whose reward is the sum of weight * normalised score over `parts`.

    A sample that one of the parts cannot score has no reward. The Labels it returns have the
    scores of every part as they were given.
    """

    def score(samples: Sequence[Sample]) -> Labels:
        prompts = [sample.prompt.prompt_id for sample in samples]
        totals: list[float | None] = [0.0] * len(samples)
        scores, counts = {}, {}
        for name, (part, scorer) in parts.items():
            try:
                found = scorer(samples)
            except RewardError as error:
                raise RewardError(_OF_REWARD.sub(f"reward.parts.{name}.", str(error))) from error
            labels = found if isinstance(found, Labels) else Labels(list(found))
            scores[name] = labels.rewards
            counts[f"{name}_unlabelled"] = labels.unlabelled
            counts |= {f"{name}_{key}": count for key, count in labels.counts.items()}
            normal = normalise_scores(labels.rewards, prompts, by=part.normalise)
            totals = [
                None if total is None or one is None else total + part.weight * one
                for total, one in zip(totals, normal, strict=True)
            ]
        return Labels(totals, parts=scores, counts=counts)

    return score


def normalise_scores(
    scores: Sequence[float | None], prompts: Sequence[str], *, by: str
) -> list[float | None]:
    """Return scores with mean 0 and population standard deviation 1 in each group.

    Equal scores become 0; those that are None stay so and count for nothing.

    Args:
      prompts: the prompt id of each score.
      by: "file", one group; "prompt", one a prompt; "none", nothing is changed.
    """
    if by == "none":
        return list(scores)
    groups: dict[str, list[int]] = {}
    for index, (score, prompt) in enumerate(zip(scores, prompts, strict=True)):
        if score is not None:
            groups.setdefault(prompt if by == "prompt" else "", []).append(index)
    result: list[float | None] = [None] * len(scores)
    for members in groups.values():
        values = np.array([scores[index] for index in members], np.float64)
        # By comparison, since the deviation of equal numbers may be rounded to more than 0.
        spread = values.std() if values.max() > values.min() else 1.0
        for index, value in zip(members, (values - values.mean()) / spread, strict=True):
            result[index] = float(value) if values.max() > values.min() else 0.0
    return result

"""Several rewards as one: a weighted sum of scores, each normalised according to its part."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from halos_jax.config import ConfigError
from halos_jax.config.rewards import PartConfig, RewardConfig, ScorerConfig
from halos_jax.models.hf.families import ModelError
from halos_jax.rewards.labels import Labels, RewardError, Scorer
from halos_jax.types import Sample

_OWN = ("weight", "normalise")
# "reward." at the start of a field's name in a message, not inside a path or a file's name.
_OF_REWARD = re.compile(r"(?<![\w./-])reward\.(?!py\b)")


@contextlib.contextmanager
def name_fields(prefix: str) -> Iterator[None]:
    """Call the fields of `reward` by another prefix ("reward.parts.a.") in errors of the block."""
    try:
        yield
    except (ConfigError, ModelError, RewardError) as error:
        raise type(error)(_OF_REWARD.sub(lambda _: prefix, str(error))) from error


def part_to_reward(part: PartConfig | ScorerConfig, reward: RewardConfig) -> RewardConfig:
    """Return a reward with the fields of a part, and from `reward` those that parts do not have."""
    fields = [field.name for field in dataclasses.fields(part) if field.name not in _OWN]
    changes = {name: getattr(part, name) for name in fields}
    return dataclasses.replace(reward, parts={}, **changes)


def make_sum_scorer(parts: Mapping[str, tuple[PartConfig, Scorer]]) -> Scorer:
    """Return the scorer whose reward is the sum of weight * normalised score over `parts`.

    A sample without a score from one of the parts has no reward. The Labels hold the scores of all
    parts before normalisation.
    """

    def score(samples: Sequence[Sample]) -> Labels:
        prompts = [sample.prompt.prompt_id for sample in samples]
        totals: list[float | None] = [0.0] * len(samples)
        scores, counts = {}, {}
        for name, (part, scorer) in parts.items():
            with name_fields(f"reward.parts.{name}."):
                found = scorer(samples)
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

    Equal scores become 0. Scores that are None stay None and are left out of the statistics.

    Args:
      prompts: the prompt id of each score.
      by: "file": one group; "prompt": one group per prompt; "none": scores stay as they are.
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
        # Compare, because rounding may make the deviation of equal numbers larger than 0.
        spread = values.std() if values.max() > values.min() else 1.0
        for index, value in zip(members, (values - values.mean()) / spread, strict=True):
            result[index] = float(value) if values.max() > values.min() else 0.0
    return result

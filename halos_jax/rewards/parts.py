"""Several rewards as one: a weighted sum of scores, each normalised as its part says."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from halos_jax.config import Config, ConfigError, bounds, limits, schema
from halos_jax.config.rewards import PartConfig, RewardConfig
from halos_jax.rewards.labels import Labels, RewardError, Scorer
from halos_jax.types import Sample

_OWN = ("weight", "normalise")
# A field of the reward in a message; not the end of a path or of a file's name.
_OF_REWARD = re.compile(r"(?<![\w./-])reward\.(?!py\b)")


def list_parts(reward: RewardConfig) -> dict[str, PartConfig]:
    """Return the parts of a reward by name, with the fields that they do not set filled in.

    Raises:
      ConfigError: where a part has an unknown field or a bad value.
    """
    errors: list[str] = []
    parts = _build_parts(reward, errors)
    if errors:
        raise ConfigError("\n".join(errors))
    return parts


def check_parts(config: Config) -> list[str]:
    """Return an error line for each part of `config.reward` that cannot be."""
    errors: list[str] = []
    parts = _build_parts(config.reward, errors)
    rules = {name.rpartition(":")[2] for name in config.reward.rules}
    for name, part in parts.items():
        path = f"reward.parts.{name}"
        if name in rules or name == "unpenalised":
            errors.append(f"{path}: a metric has this name already; choose another")
        if not part.weight:
            errors.append(f"{path}.weight: got 0, allowed: another number; or leave the part out")
        if any(line.startswith(f"{path}.") for line in errors):
            continue
        # What a reward must be alone, it must be as a part.
        alone = dataclasses.replace(config, reward=part_to_reward(part, config.reward))
        values = dict(schema.flatten(schema.to_plain(alone)))
        lines = [*bounds.find_violations(alone), *limits.find_violations(values)]
        own = [line for line in lines if line.startswith("reward.")]
        errors += [line.replace("reward.", f"{path}.") for line in own]
    return errors


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


def _build_parts(reward: RewardConfig, errors: list[str]) -> dict[str, PartConfig]:
    names = {field.name for field in dataclasses.fields(PartConfig)} - set(_OWN)
    defaults = {name: value for name, value in schema.to_plain(reward).items() if name in names}
    parts = {}
    for name, given in reward.parts.items():
        path = f"reward.parts.{name}"
        if not isinstance(given, Mapping):
            errors.append(f"{path}: got {given!r}, allowed: a section: kind, weight, ...")
            continue
        plain = defaults | schema.to_plain(given)
        judge = given.get("judge")
        if isinstance(judge, Mapping):
            plain["judge"] = defaults["judge"] | schema.to_plain(judge)
        lines: list[str] = []
        parts[name] = schema.build(PartConfig, plain, lines)
        errors += [f"{path}.{line}" for line in lines]
    return parts

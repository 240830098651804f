"""A scorer that was handed over from Python, with a check of what it gives."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from halos_jax.data.records.fields import shorten
from halos_jax.rewards.function_scorer import read_number
from halos_jax.rewards.labels import Labels, RewardError, Scorer
from halos_jax.types import Sample


def guard_scorer(scorer: Scorer) -> Scorer:
    """Return `scorer` so that it gives one finite number or None for each sample, or raises.

    Raises:
      RewardError: by the returned scorer, where its function gives anything else.
    """

    def score(samples: Sequence[Sample]) -> list[float | None] | Labels:
        found = scorer(samples)
        if isinstance(found, Labels):
            return dataclasses.replace(found, rewards=_read_all(found.rewards, samples))
        return _read_all(found, samples)

    return score


def _read_all(found: Any, samples: Sequence[Sample]) -> list[float | None]:
    # An array of one dimension becomes what it holds.
    listed = list(found) if getattr(found, "ndim", 0) == 1 else found
    if not isinstance(listed, (list, tuple)) or len(listed) != len(samples):
        size = f"{len(listed)} values" if isinstance(listed, (list, tuple)) else shorten(found)
        raise RewardError(
            f"reward: the function got {len(samples)} samples and gave {size}; allowed: a list of "
            "as many numbers, with None where there is no reward"
        )
    return [_read_reward(*pair) for pair in zip(listed, samples, strict=True)]


def _read_reward(value: object, sample: Sample) -> float | None:
    number = read_number(value)
    if number is None and value is not None:
        raise RewardError(
            f"reward: the function gave {shorten(value)} for prompt {sample.prompt.prompt_id}, "
            f"sample {sample.sample_id}; allowed: a finite number, or None for no reward"
        )
    return number

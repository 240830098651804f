"""Labels: the rewards that scorers give, penalties on them, and their records in scores.jsonl."""

import collections
import dataclasses
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halos_jax.config import RewardConfig
from halos_jax.config.kinds import REWARD_KINDS
from halos_jax.data.records.fields import Fields
from halos_jax.data.records.reading import read_records
from halos_jax.errors import UserError
from halos_jax.once import say_once
from halos_jax.types import FINISH_LENGTH, Sample

logger = logging.getLogger(__name__)


class RewardError(UserError, ValueError):
    """A reward function, model or judge gave an invalid reward, or none for too many samples."""


@dataclasses.dataclass(frozen=True, slots=True)
class Labels:
    """One reward per sample, None if it has none; every list is as long as the samples.

    `raw` are the rewards before the penalty for a missing end, empty if there is no penalty;
    `parts` are the scores that a sum was made of, by name, before they were normalised; `counts`
    are a scorer's own counts, such as ties.
    """

    rewards: list[float | None]
    raw: list[float | None] = dataclasses.field(default_factory=list)
    parts: Mapping[str, list[float | None]] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def unlabelled(self) -> int:
        """The number of samples without a reward."""
        return sum(reward is None for reward in self.rewards)


# Returns a reward for each sample, None where there is none. A scorer that has more to report
# returns Labels; `label_samples` accepts either.
Scorer = Callable[[Sequence[Sample]], list[float | None] | Labels]


def list_rewards(found: list[float | None] | Labels) -> list[float | None]:
    """Return only the rewards of what a scorer returned."""
    return found.rewards if isinstance(found, Labels) else list(found)


def gives_rewards(settings: RewardConfig) -> bool:
    """Tell whether samples get a reward at all: not with `reward.kind="none"`."""
    return bool(settings.parts) or REWARD_KINDS[settings.kind].scores


def label_samples(scorer: Scorer, samples: Sequence[Sample], settings: RewardConfig) -> Labels:
    """Score `samples` and subtract the penalty from those that the token limit has cut.

    With `reward.kind="none"` no sample has a reward.

    Raises:
      RewardError: if more than the fraction `reward.max_unlabelled` has no reward.
    """
    found = scorer(samples)
    labels = found if isinstance(found, Labels) else Labels(list(found))
    if not gives_rewards(settings):
        return labels
    check_unlabelled(labels.unlabelled, len(samples), settings.max_unlabelled)
    if labels.unlabelled:
        say_once(
            logger,
            "%d of %d samples have no reward: they are left out",
            labels.unlabelled,
            len(samples),
        )
    if not settings.missing_eos_penalty:
        return labels
    penalties = [
        settings.missing_eos_penalty if sample.finish_reason == FINISH_LENGTH else 0.0
        for sample in samples
    ]
    rewards = [
        None if reward is None else reward - penalty
        for reward, penalty in zip(labels.rewards, penalties, strict=True)
    ]
    return dataclasses.replace(labels, rewards=rewards, raw=labels.rewards)


def check_unlabelled(count: int, total: int, allowed: float) -> None:
    """Raise RewardError if `count` of `total` samples is more than the fraction `allowed`."""
    if count > allowed * total:
        raise RewardError(
            f"{count} of {total} samples have no reward, more than reward.max_unlabelled={allowed} "
            "allows: a function gave None, or a judge no usable answer; a judge's "
            "answers are kept: mend the cause, or raise --config.reward.max_unlabelled, and run "
            "the same command again"
        )


def average_rewards(rewards: Sequence[float | None]) -> float:
    """Return the mean of the rewards that are not None; 0 if there are none."""
    return statistics.fmean([one for one in rewards if one is not None] or [0.0])


def measure_labels(labels: Labels, split: str) -> dict[str, float]:
    """Return the metrics that a manifest keeps beside the mean reward, under names with `split`.

    They are the means of the parts ("reward_eval/NAME") and of the rewards before the penalty, the
    number of samples left out ("unlabelled_eval"), and the scorer's own counts.
    """
    lists = dict(labels.parts) | ({"unpenalised": labels.raw} if labels.raw else {})
    means = {f"reward_{split}/{name}": average_rewards(values) for name, values in lists.items()}
    counts = {"unlabelled": labels.unlabelled, **labels.counts}
    return means | {f"{name}_{split}": count for name, count in counts.items()}


def make_score_rows(samples: Sequence[Sample], labels: Labels) -> list[dict[str, Any]]:
    """Return the records of scores.jsonl, one per sample: its reward and what it is made of."""
    rows = []
    for index, sample in enumerate(samples):
        row = {
            "prompt_id": sample.prompt.prompt_id,
            "sample_id": sample.sample_id,
            "reward": labels.rewards[index],
            "type": "score",
        }
        if labels.raw:
            row["raw_reward"] = labels.raw[index]
        if labels.parts:
            row["parts"] = {name: values[index] for name, values in labels.parts.items()}
        rows.append(row)
    return rows


def read_labels(path: str | Path, samples: Sequence[Sample]) -> Labels:
    """Return the labels that `make_score_rows` has made rows of, without the scorer's counts.

    Raises:
      RecordError: as `read_scores`.
    """
    rewards = [sample.reward for sample in read_scores(path, samples)]
    raw, parts = list[float | None](), dict[str, list[float | None]]()
    for line, record in read_records(path, allow_empty=True):
        if "raw_reward" in record:
            raw.append(Fields(record, str(path), line).number("raw_reward"))
        for name, value in record.get("parts", {}).items():
            parts.setdefault(name, []).append(value)
    return Labels(rewards, raw, parts)


def join_labels(labels: Sequence[Labels]) -> Labels:
    """Return the labels of all samples of several calls of one scorer; counts are added up."""
    counts: collections.Counter[str] = collections.Counter()
    for one in labels:
        counts.update(one.counts)
    parts = labels[0].parts if labels else {}
    return Labels(
        [reward for one in labels for reward in one.rewards],
        [reward for one in labels for reward in one.raw],
        {name: [score for one in labels for score in one.parts[name]] for name in parts},
        dict(counts),
    )


def read_scores(path: str | Path, samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples with their rewards from a scores.jsonl file, None where it has none.

    Raises:
      RecordError: if a record is not the score of the sample at its position.
    """
    scored = []
    rows = list(read_records(path, allow_empty=True))
    for (line, record), sample in zip(rows, samples, strict=True):
        fields = Fields(record, str(path), line)
        found = (fields.identifier("prompt_id"), fields.integer("sample_id"))
        expected = (sample.prompt.prompt_id, sample.sample_id)
        if found != expected:
            raise fields.error("prompt_id, sample_id", found, f"{expected}, as in the samples")
        scored.append(dataclasses.replace(sample, reward=fields.number("reward")))
    return scored

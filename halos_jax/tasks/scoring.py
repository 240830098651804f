"""Scores for samples from a file; like the samples themselves, they are saved shard by shard."""

import logging
from collections.abc import Sequence
from pathlib import Path

from halos_jax import sharding
from halos_jax.config import RewardConfig
from halos_jax.config.kinds import REWARD_KINDS
from halos_jax.data.records.reading import read_records
from halos_jax.rewards.labels import (
    Labels,
    Scorer,
    average_rewards,
    label_samples,
    list_rewards,
    make_score_rows,
    measure_labels,
    read_scores,
)
from halos_jax.rounds.context import StageResult
from halos_jax.rounds.stages import remove_shards, write_rows, write_shard
from halos_jax.types import Sample
from halos_jax.workdir.workspace import Workspace

logger = logging.getLogger(__name__)

SCORES = "scores.jsonl"
_LABEL = "scores"


def write_scores(workspace: Workspace, scorer: Scorer, samples: Sequence[Sample]) -> StageResult:
    """Score `samples` into the workdir's scores.jsonl; return the rewards' mean and counts.

    Raises:
      RewardError: as `label_samples`; the scores up to then are kept in shards.
    """

    labels = score_samples(workspace, scorer, samples)
    rows = make_score_rows(samples, labels)
    write_rows(workspace, workspace.workdir / SCORES, rows)
    metrics = {"reward_label": average_rewards(labels.rewards)}
    return StageResult({SCORES: len(rows)}, metrics | measure_labels(labels, "label"))


def score_samples(
    workspace: Workspace, scorer: Scorer, samples: Sequence[Sample], *, label: str = _LABEL
) -> Labels:
    """Return the labels of `samples` by the reward of the workspace's config.

    Rewards that depend on their sample alone are kept in shards, `LABEL.shard-0000.jsonl`.

    Raises:
      RewardError: as `label_samples`.
    """

    def score(asked: Sequence[Sample]) -> list[float | None] | Labels:
        if not _scores_one_by_one(workspace.config.reward):
            return scorer(asked)
        return score_in_shards(workspace, scorer, asked, label=label)

    return label_samples(score, samples, workspace.config.reward)


def score_in_shards(
    workspace: Workspace, scorer: Scorer, samples: Sequence[Sample], *, label: str = _LABEL
) -> list[float | None]:
    """Return the scorer's result for each sample; shards that are on disk are not scored again.

    A shard holds all samples of `sampling.shard_prompts` prompts, so equal samples of one prompt
    are scored together and remain a tie. Until the stage is committed, the shards are kept in the
    workdir as `LABEL.shard-0000.jsonl`.
    """
    rewards: list[float | None] = [None] * len(samples)
    for number, members in enumerate(_split(samples, workspace.config.sampling.shard_prompts)):
        workspace.stop.check()
        path = workspace.workdir / f"{label}.shard-{number:04d}.jsonl"
        shard = [samples[index] for index in members]
        is_scored = path.exists() and _is_of(path, shard)
        # No process may write the file until all have looked for it: they must all agree.
        sharding.wait_for_all(f"looked for {path.name}")
        if not is_scored:
            write_shard(
                workspace, path, make_score_rows(shard, Labels(list_rewards(scorer(shard))))
            )
        for index, scored in zip(members, read_scores(path, shard), strict=True):
            rewards[index] = scored.reward
    return rewards


def _is_of(path: Path, shard: Sequence[Sample]) -> bool:
    """Tell whether a file holds scores of these samples: shards may have had another size."""
    found = [(one.get("prompt_id"), one.get("sample_id")) for _, one in read_records(path)]
    if found == [(one.prompt.prompt_id, one.sample_id) for one in shard]:
        return True
    logger.info("%s: holds scores of other samples; scoring it again", path)
    return False


def remove_score_shards(folder: Path) -> None:
    """Delete the score shards, once the scores are committed."""
    remove_shards(folder, _LABEL)


def _scores_one_by_one(settings: RewardConfig) -> bool:
    """Tell whether each score depends on its sample alone, so that samples may be split."""
    return REWARD_KINDS[settings.kind].one_by_one and not settings.parts


def _split(samples: Sequence[Sample], prompts_per_shard: int) -> list[list[int]]:
    """Split the samples' indices into shards of whole prompts, in order of first appearance."""
    shard_of: dict[str, int] = {}
    shards: list[list[int]] = []
    for index, sample in enumerate(samples):
        shard = shard_of.setdefault(sample.prompt.prompt_id, len(shard_of) // prompts_per_shard)
        if shard == len(shards):
            shards.append([])
        shards[shard].append(index)
    return shards

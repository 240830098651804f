"""Scores of pairs by rewards that compare samples: a judge in mode "compare", normalised parts.

Such a reward says nothing of one policy's samples by themselves (`held_out.find_relative`), so each
pair is shown to it as the two samples of a prompt of their own.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from halos_jax.config import RewardConfig
from halos_jax.rewards.labels import Scorer, label_samples
from halos_jax.types import Sample

Scores = list[float | None]


def score_pairs(
    scorer: Scorer, pairs: Sequence[tuple[Sample, Sample]], settings: RewardConfig
) -> tuple[Scores, Scores, Mapping[str, int]]:
    """Return the scores of the first and of the second samples, and the scorer's own counts.

    A judge gives 1 to the sample that it prefers in both orders, 0 to the other one, and 1/2 to
    both of a tie or where its verdicts contradict each other. Scores of parts with
    `normalise="file"` are normalised over all samples of all pairs, those with "prompt" over the
    two of a pair.

    Raises:
      RewardError: as `label_samples`.
    """
    samples = [
        dataclasses.replace(
            one,
            prompt=dataclasses.replace(one.prompt, prompt_id=f"{one.prompt.prompt_id}#{number}"),
            sample_id=side,
        )
        for number, pair in enumerate(pairs)
        for side, one in enumerate(pair)
    ]
    labels = label_samples(scorer, samples, settings)
    return labels.rewards[::2], labels.rewards[1::2], labels.counts

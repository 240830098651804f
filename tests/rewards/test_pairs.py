"""Rewards that compare samples, asked of pairs."""

import pytest

from halos_jax.config import RewardConfig
from halos_jax.config.rewards import PartConfig
from halos_jax.rewards.judge.scorer import count_wins, list_pairs
from halos_jax.rewards.labels import RewardError
from halos_jax.rewards.pairs import score_pairs
from halos_jax.rewards.parts import make_sum_scorer
from halos_jax.types import Prompt, Sample, Turn


def draw(text, prompt="p"):
    return Sample(Prompt(prompt, (Turn("user", prompt),)), 0, text, (1,), (2,), "stop")


# All of one prompt: the pairs of a prompt may not meet each other.
PAIRS = [(draw("long"), draw("a")), (draw("b"), draw("c")), (draw("d"), draw("longest"))]


def prefer_longer(samples):
    """Compare as a judge does; of the answer "e" it says nothing."""
    pairs, points = list_pairs(samples, "all"), {}
    for i, j in pairs:
        one, other = (len(samples[index].output) for index in (i, j))
        points[i, j] = 0.5 if one == other else float(one > other)
        if "e" in (samples[i].output, samples[j].output):
            points[i, j] = None
    return count_wins(len(samples), points)


def test_a_pair_meets_nobody_else():
    first, second, counts = score_pairs(prefer_longer, PAIRS, RewardConfig(kind="judge"))
    assert (first, second) == ([1.0, 0.5, 0.0], [0.0, 0.5, 1.0])
    assert counts == {"comparisons": 3, "ties": 1, "undecided": 0}


def test_undecided_pairs_have_no_scores_and_are_bounded():
    pairs = [*PAIRS, (draw("e"), draw("f"))]
    settings = RewardConfig(kind="judge", max_unlabelled=0.25)
    first, second, _ = score_pairs(prefer_longer, pairs, settings)
    assert (first[3], second[3]) == (None, None)
    with pytest.raises(RewardError, match="2 of 8 samples have no reward"):
        score_pairs(prefer_longer, pairs, RewardConfig(kind="judge"))


def test_parts_are_normalised_over_both_sets():
    def count(samples):
        return [float(len(one.output)) for one in samples]

    for by, expected in (("prompt", [1.0, 0.0, -1.0]), ("file", [0.6547, -0.6547, -0.6547])):
        scorer = make_sum_scorer({"a": (PartConfig(kind="function", normalise=by), count)})
        first, _, _ = score_pairs(scorer, PAIRS, RewardConfig(kind="function"))
        assert first == pytest.approx(expected, abs=1e-4)  # mean 2.5, variance 5.25

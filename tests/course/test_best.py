"""Which round is the best, and how long that is known."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

from halos_jax.course.best import Best, choose_best, find_highest, read_best, read_number


def make_rounds(*rewards, **first):
    """Return rounds with these rewards (None: not evaluated), each with its decision."""
    done = []
    for round, reward in enumerate(rewards):
        metrics = {} if reward is None else {"reward_eval": reward}
        one = SimpleNamespace(round=round, metrics=metrics, decisions={})
        best = choose_best([*done, one], begin=False)
        one.decisions = {} if best is None else {"best": best.to_record()}
        done.append(one)
    return done


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.2], Best(0, 0.2, 1)),
        ([0.2, 0.1], Best(0, 0.2, 2)),
        ([0.2, 0.3, 0.1], Best(1, 0.3, 3)),
        ([0.2, 0.3, 0.3], Best(1, 0.3, 3)),  # of equal ones the earlier
        ([0.2, None, 0.3, None], Best(2, 0.3, 2)),  # rounds that were not evaluated
        ([-0.2, 0.0], Best(1, 0.0, 2)),
        ([math.nan, None], Best(0, None, 0)),  # nothing is known yet
        ([math.nan, None, -1.0], Best(2, -1.0, 1)),
    ],
)
def test_the_best_round_has_the_highest_reward_and_is_the_earliest(rewards, expected):
    assert read_best(make_rounds(*rewards)[-1]) == expected


def test_rounds_whose_checkpoints_were_not_kept_are_not_chosen():
    """A run of an older version names no best round: its best policy may be gone."""
    old = [
        SimpleNamespace(round=round, metrics={"reward_eval": reward}, decisions={})
        for round, reward in enumerate((0.2, 0.9, 0.4))
    ]
    assert choose_best(old, begin=False) is None
    # Asked for on the way, it begins with the SFT policy and the round that ends now.
    assert choose_best(old, begin=True) == Best(2, 0.4, 2)
    worse = [*old[:2], dataclasses.replace(Lasts(2), metrics={"reward_eval": 0.1})]
    assert choose_best(worse, begin=True) == Best(0, 0.2, 2)
    assert read_best(old[0]) is None and read_best(None) is None


@dataclasses.dataclass
class Lasts:
    round: int
    metrics: dict = dataclasses.field(default_factory=dict)
    decisions: dict = dataclasses.field(default_factory=dict)


def test_the_highest_value_of_a_metric_is_found_among_those_that_have_it():
    rounds = [Lasts(0), Lasts(1, {"x": 2}), Lasts(2, {"x": 2.0}), Lasts(3, {"x": math.inf})]
    assert find_highest(rounds, "x") == (rounds[1], 2)
    assert find_highest(rounds, "y") == (None, 0)
    assert read_number(Lasts(0, {"x": True}), "x") is None
    assert read_number(Lasts(0, {"x": "2"}), "x") is None
    assert read_number(Lasts(0, {"x": 2}), "x") == 2.0

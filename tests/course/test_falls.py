"""The interval of a difference: paired, and wider the more rounds the best was chosen from."""

import math
import random
import statistics

import pytest

from halos_jax.course.falls import compare_means, compare_paired
from halos_jax.signs.intervals import Estimate


def test_the_difference_is_taken_prompt_by_prompt():
    best = {"a": [1.0, 0.0], "b": [1.0], "c": [0.0, 0.0], "d": [5.0]}
    now = {"a": [0.0, 0.0], "b": [0.5], "c": [0.0, 0.5], "e": [-9.0], "d": []}
    change = compare_paired(now, best, chosen_from=1)
    differences = [-0.5, -0.5, 0.25]
    error = statistics.stdev(differences) / math.sqrt(3)
    assert change.value == pytest.approx(statistics.fmean(differences))
    assert change.low == pytest.approx(change.value - 1.959963984540054 * error)
    assert change.high == pytest.approx(change.value + 1.959963984540054 * error)
    assert compare_paired(now, {"a": [1.0]}, chosen_from=1) is None  # no spread is known


def test_the_best_of_more_rounds_must_be_missed_by_more():
    now, best = {"a": [0.0], "b": [1.0]}, {"a": [1.0], "b": [1.0]}
    one, ten = (compare_paired(now, best, chosen_from=count) for count in (1, 10))
    # The normal distribution's point for 0.05 / 10, both sides: 2.807.
    assert ten.high - ten.value == pytest.approx((one.high - one.value) * 2.807 / 1.96, rel=1e-3)
    assert ten.value == one.value


def test_independent_means_add_their_errors():
    change = compare_means(Estimate(0.4, 0.1, 0.7), Estimate(0.9, 0.5, 1.2), chosen_from=1)
    assert change == pytest.approx((-0.5, -1.0, 0.0))


@pytest.mark.parametrize("rounds", [2, 16])
def test_a_run_that_stands_still_is_seldom_taken_for_one_that_falls(rounds):
    """Without the allowance for the choice, half of all runs of 16 rounds would be."""
    rng = random.Random(5)
    alarms = 0
    for _ in range(200):
        drawn = [
            {str(prompt): [float(rng.random() < 0.3)] for prompt in range(60)}
            for _ in range(rounds + 1)
        ]
        *before, now = drawn
        best = max(before, key=lambda one: sum(map(sum, one.values())))
        alarms += compare_paired(now, best, chosen_from=rounds).high < 0
    assert alarms <= 0.05 * 200

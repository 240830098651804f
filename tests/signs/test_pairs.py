"""Samples paired by prompt, and their scores compared, against counts by hand."""

import dataclasses
import math

import pytest

from halos_jax.data.records.fields import RecordError
from halos_jax.signs.intervals import estimate_mean
from halos_jax.signs.pairs import compare_scores, pair_samples
from halos_jax.types import Prompt, Sample, Turn


def draw(**numbers):
    """Return samples of prompts with these names, with these numbers, in this order."""
    return [
        Sample(
            Prompt(name, (Turn("user", name),), place=f"line {name}"), number, "x", (1,), (2,), ""
        )
        for name, found in numbers.items()
        for number in found
    ]


def test_the_kth_sample_of_a_prompt_meets_the_kth():
    first, second = draw(a=[1, 0], b=[0, 1], c=[0]), draw(b=[3], a=[0, 1, 2], d=[0, 1])
    found = pair_samples(first, second)
    # The best of four may be number 3; it meets the only one that the other set has.
    assert found.pairs == [(1, 1), (0, 2), (2, 0)]
    assert (found.first_alone, found.second_alone) == (2, 3)
    assert (found.first_prompts, found.second_prompts) == (1, 1)
    assert not found.is_whole and pair_samples(first, first).is_whole


def test_an_id_of_two_conversations_is_refused():
    (other,) = draw(a=[0])
    prompt = dataclasses.replace(other.prompt, turns=(Turn("user", "b"),), place="line 7")
    with pytest.raises(RecordError, match=r"line a: got prompt_id 'a' for another .* than line 7"):
        pair_samples(draw(a=[0]), [dataclasses.replace(other, prompt=prompt)])


def test_wins_ties_and_losses_are_counted_and_intervals_count_prompts():
    scores, others = [3.0, 1.0, 0.0, None, 2.0], [1.0, 1.0, 2.0, 1.0, None]
    found = compare_scores(scores, others, ["a", "a", "b", "c", "c"])
    assert (found.wins, found.ties, found.losses, found.unscored) == (1, 1, 1, 2)
    assert found.win_rate.value == 0.5
    assert (found.first.value, found.second.value) == (pytest.approx(4 / 3), pytest.approx(4 / 3))
    assert found.gain == estimate_mean([2.0, 0.0, -2.0], ["a", "a", "b"])
    assert found.to_record()["gain"] == found.gain._asdict()


def test_what_is_not_known_of_a_spread_is_null():
    one = compare_scores([1.0, 2.0], [0.0, 0.0], ["a", "a"])
    assert one.gain.low == -math.inf
    assert one.to_record()["gain"] == {"value": 1.5, "low": None, "high": None}
    none = compare_scores([None], [1.0], ["a"])
    assert none.win_rate is None and none.to_record()["win_rate"] is None and none.unscored == 1

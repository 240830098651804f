"""Values that were computed again against recorded ones."""

import math

import pytest

from halos_jax.audit.rederive import compare
from halos_jax.audit.rederive.compare import (
    EXACT,
    Amount,
    Tolerance,
    compare_rows,
    compare_values,
    judge,
)

CLOSE = Tolerance(relative=0.01, absolute=0.5)


@pytest.mark.parametrize(
    ("recorded", "found", "tolerance", "allowed"),
    [
        (1.0, 1.0, EXACT, True),
        (1.0, math.nextafter(1.0, 2), EXACT, False),
        (100.0, 101.5, CLOSE, True),
        (100.0, 101.6, CLOSE, False),
        (math.nan, math.nan, EXACT, True),
        (math.nan, 1.0, CLOSE, False),
    ],
)
def test_a_tolerance_is_a_share_and_an_amount(recorded, found, tolerance, allowed):
    assert tolerance.allows(recorded, found) is allowed


@pytest.mark.parametrize(
    ("recorded", "found", "first"),
    [
        ({"a": [1, 2.0]}, {"a": [1, 2.0]}, ""),
        ({"a": [1, 2.0]}, {"a": [1, 2.1]}, "a[1]: 2.0 is recorded, 2.1 is what it follows to be"),
        ({"a": True}, {"a": 1}, ""),
        ({"a": "x"}, {}, "a: 'x' is recorded, None is what it follows to be"),
        ({}, {"b": 1}, "b: None is recorded, 1 is what it follows to be"),
        ({"a": [1]}, {"a": [1, 2]}, "a: [1] is recorded, [1, 2] is what it follows to be"),
    ],
)
def test_the_first_difference_is_named(recorded, found, first):
    assert compare_values(recorded, found).first == first


def test_lines_are_counted_and_the_largest_difference_is_kept():
    recorded, found = [{"a": 1.0}, {"a": 2.0}], [{"a": 1.25}, {"a": 2.5}]
    difference = compare_rows(recorded, found)
    assert difference.first == "line 1 a: 1.0 is recorded, 1.25 is what it follows to be"
    assert difference.largest == 0.5
    assert compare_rows(recorded, found, CLOSE).first == ""
    assert compare_rows(recorded, found[:1]).first == "2 records, expected 1"


@pytest.mark.parametrize(
    ("found", "is_same", "outcome", "why"),
    [
        (1.0, True, "passed", ""),
        (1.25, True, "differs", "1.25 is what it follows to be; the largest difference is 0.25"),
        (1.25, False, "passed", "not to the last bit, but within; the largest difference is 0.25"),
        (9.0, False, "differs", "9.0 is what it follows to be; the largest difference is 8"),
    ],
)
def test_a_difference_is_allowed_only_where_another_execution_explains_it(
    found, is_same, outcome, why
):
    exact, close = (compare_values(1.0, found, one) for one in (EXACT, CLOSE))
    amount = Amount(3, 9, "samples")
    finding = judge("rewards", "again", exact, close, is_same=is_same, amount=amount)
    assert (finding.outcome, finding.amount) == (outcome, "3 of 9 samples")
    assert finding.why.endswith(why)


def test_no_equal_bits_are_due_where_programs_were_compiled_again(monkeypatch):
    why = "programs had to be compiled again: jit_step"
    monkeypatch.setattr(compare, "explain_programs", lambda: why)
    amount = Amount(3, 9, "steps")
    for found, outcome in ((1.25, "passed"), (9.0, "differs")):
        exact, close = (compare_values(1.0, found, one) for one in (EXACT, CLOSE))
        finding = judge("steps", "again", exact, close, is_same=True, amount=amount)
        assert finding.outcome == outcome
        assert outcome == "differs" or finding.why.endswith(f"is 0.25; {why}")


def test_sums_over_an_answer_are_left_out_where_they_are_known_per_token():
    metrics = {"kl_stale": 9.0, "kl_stale_per_token": 0.1, "ratio_p99": 3.0, "reward": 1.0}
    metrics |= {"kl_stale/low": 8.0, "kl_stale_per_token/low": 0.08, "ratio_per_token_p99": 0.2}
    metrics |= {"kl_stale_age/1": 9.0, "kl_sampled_stale_age/2/high": 9.0}  # of what is replayed
    kept = ["kl_stale_per_token", "reward", "kl_stale_per_token/low", "ratio_per_token_p99"]
    assert compare.drop_sums(metrics) == {name: metrics[name] for name in kept}

"""Scores and verdicts: taken where an answer is clear, never guessed."""

import pytest

from halos_jax.rewards.judge.answers import parse_score, parse_verdict


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Final Score: 7", 7),
        ("It has 3 faults of 5.\n**Final Score:** 7/10", 7),
        ("**Final Score**: 7", 7),
        ("**Final Score: 7.5**", 7.5),
        ("final score = [[8]].", 8),
        ("Final Score: 10.", 10),
        ("Final Score:\n8", 8),
        ("Final Score: 7 out of 10", 7),
        ("Final Score: $7$", 7),
        ("Final Score: 1\nNo.\nFinal Score: 2", 2),
        ("Final Score: 7-8", None),
        ("Final Score: 7 to 8", None),
        ("Final Score: 7,5", None),
        ("Final Score: 7%", None),
        ("Final Score: 1e1", None),
        ("Final Score: 4/5", None),  # another scale
        ("Final Score: 11", None),
        ("Final Score: -1", None),
        ("Final Score: N/A\nRating: 3", None),  # the label is there, and says nothing
        ("Rating from 0 to 10: 7", 7),
        ("My rating: 7/10.", 7),
        ("7", 7),
        (" **7/10**\n", 7),
        ('{"reason": "3 faults", "score": 7}', 7),
        ('{"rating": 8,\n"faults": 1}', 8),
        ("Rating: 3\nSo, score: 3", 3),
        ("Clarity score: 3\nTruth score: 5", None),
        ("Score from 0 to 10", None),
        ("On a scale of 10, I find 3 faults", None),
        ("There are 3", None),
        ("", None),
    ],
)
def test_a_score_is_read_where_it_is_clear(text, score):
    assert parse_score(text, lowest=0, highest=10) == score


def test_the_limits_are_those_of_the_config():
    assert parse_score("Final Score: -2", lowest=-5, highest=5) == -2
    assert parse_score("Final Score: 4/5", lowest=-5, highest=5) == 4
    assert parse_score("Final Score: .5", lowest=0, highest=1) == 0.5


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("B is long.\nFinal Verdict: A", "A"),
        ("final verdict: [[B]]", "B"),
        ("**Final Verdict:** tie.", "tie"),
        ("Final Verdict: Answer B\nIt was close.", "B"),
        ("Final Verdict: A\nOr rather:\nFinal Verdict: B", "B"),
        ("A", "A"),
        ("[[b]]", "B"),
        ("Final Verdict: A or B", None),
        ("Final Verdict: neither", None),
        ("A is better", None),
        ("I choose A", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_where_it_is_clear(text, verdict):
    assert parse_verdict(text) == verdict
